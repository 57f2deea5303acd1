"""The report of a run: one page without outside references, whatever the run has or lacks."""

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest

from tests import ROOT

SCRIPT = ROOT / "tools" / "report.py"
PLOTS = {
    "Held-out divergence from the teacher", "Training loss", "Completion length", "The student's "
    "own completions",
    "Where an update's time goes", "Speed in completion tokens", "Gradient", "Learning rate",
}  # fmt: skip


def update(step, **more):
    return {
        "step": step, "loss": 0.6 / step, "loss/student": 0.7 / step, "loss/data": 0.5 / step, "lr": 1e-4,
        "source": {"student": 3, "data": 1}, "grad_norm": 1.0, "completion_tokens": 300,
        "mean_completion_length": 37.5, "student/finished_share": 0.9, "student/looping_share": 0.1,
        "perf/rollout_s": 1.0, "perf/score_s": 0.25, "perf/learn_s": 0.5, "perf/update_s": 0.1, "perf/step_s": 2.0,
        "perf/rollout_tokens_per_s": 300.0, **more,
    }  # fmt: skip


def write_run(run_dir, rows, rollouts=None, answers=None, config=None):
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if rollouts is not None:
        (run_dir / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rollouts))
    for name, content in (("answers.json", answers), ("config.resolved.json", config)):
        if content is not None:
            (run_dir / name).write_text(json.dumps(content))
    return run_dir


def report(*arguments):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


class Page(HTMLParser):
    """Text, images and every address of a page, and whether its <div>s are closed."""

    def __init__(self, path):
        super().__init__()
        self.text, self.images, self.addresses, self.open_divs = "", {}, [], 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.open_divs += tag == "div"
        self.addresses += [
            attributes[name] for name in ("src", "href", "srcset", "data") if name in attributes
        ]
        if tag == "img":
            self.images[attributes["alt"]] = attributes["src"]
        assert tag not in ("script", "iframe", "link", "b-injected"), tag

    def handle_endtag(self, tag):
        self.open_divs -= tag == "div"

    def handle_data(self, data):
        self.text += data + " "


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    rows = [{"step": 0, "eval/loss": 0.4, "eval/on_policy_loss": 0.61, "eval/samples": 64}]
    for step in range(1, 21):
        rows.append(
            update(step, **({"loss": None, "grad_norm": None, "skipped": 1} if step == 7 else {}))
        )
        if step % 10 == 0:
            rows.append({"step": step, "eval/loss": 0.4 / step, "eval/on_policy_loss": 2.44 / step})
    rollouts = [
        {"step": step, "prompt": "A <b-injected> & prompt", "completion": "ends \ud800 here", "source": source,
         "teacher_logprob": math.log(0.25), "student_logprob": None, "divergence": 0.125}
        for step in range(1, 21) for source in ("student", "data")
    ]  # fmt: skip
    answers = {
        "prompts": ["Who?", "Why?"],
        "before": ["who who", ""],
        "after": ["I.", "So."],
        "teacher": ["Me.", "!"],
    }
    config = {
        "run_name": "my run",
        "teacher_model_name_or_path": "org/big-teacher",
        "lmbda": 0.5,
        "seed": 42,
    }
    run_dir = write_run(tmp_path_factory.mktemp("report") / "run", rows, rollouts, answers, config)
    done = report(run_dir)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(run_dir / "report.html"), str(run_dir / "report.png")]
    return run_dir


def test_the_page_stands_alone(full):
    page = Page(full / "report.html")
    assert page.open_divs == 0
    assert page.addresses and all(
        address.startswith("data:image/png;base64,") for address in page.addresses
    )
    assert 'name="viewport"' in (full / "report.html").read_text()


def test_every_plot_is_there_and_shows_something(full):
    page = Page(full / "report.html")
    assert set(page.images) == PLOTS
    for name, source in page.images.items():
        path = full / "one.png"
        path.write_bytes(base64.b64decode(source.partition(",")[2]))
        assert coloured_share(path) > 0.003, name
    assert coloured_share(full / "report.png") > 0.01


def coloured_share(path):
    """Share of pixels that are neither white, grey nor black: lines and bars, not axes and
    letters.
    """
    pixels = matplotlib.image.imread(path)[..., :3]
    return float(np.mean(np.ptp(pixels, axis=-1) > 0.2))


def test_numbers_texts_and_names_are_on_the_page(full):
    text = " ".join(Page(full / "report.html").text.split())
    for needed in (
        "my run", "big-teacher", "0.61 → 0.122", "-80%", "0.4 → 0.02", "-95%", "150 completion "
        "tokens/s", "20 updates",
        "Who?", "who who", "I.", "Me.", "(empty)", "student before", "student after", "A "
        "<b-injected> & prompt",
        "25.0% per token", "ends ? here", "student's own completions 0.61 0.122 -80.0%",
    ):  # fmt: skip
        assert needed in text, needed


def test_a_run_that_has_just_begun(tmp_path):
    """One update, half a line of the second, nothing else."""
    run_dir = write_run(tmp_path / "run", [update(1)])
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 0.')
    done = report(run_dir, "--output", tmp_path / "elsewhere.html")
    assert done.returncode == 0, done.stderr
    assert set(Page(tmp_path / "elsewhere.html").images) == PLOTS - {
        "Held-out divergence from the teacher"
    }
    assert (tmp_path / "elsewhere.png").exists() and not (run_dir / "report.html").exists()


def test_only_evaluations_or_only_the_least_of_keys(tmp_path):
    evaluated = write_run(tmp_path / "evaluated", [{"step": 0, "eval/chats_on_policy_loss": 0.5}])
    assert report(evaluated).returncode == 0
    assert "chats: student's own completions" in Page(evaluated / "report.html").text
    least = write_run(tmp_path / "least", [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}])
    assert report(least).returncode == 0
    assert set(Page(least / "report.html").images) == {"Training loss"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "metrics.jsonl"),
        ("", "no rows yet"),
        ('{"step": 1}\nnonsense\n{"step": 2}\n', "line 2 is not JSON"),
    ],
)
def test_nothing_to_report_is_one_sentence(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    done = report(tmp_path)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_long_run_stays_small_and_quick(tmp_path):
    run_dir = write_run(tmp_path / "run", [update(step) for step in range(1, 3001)])
    assert report(run_dir).returncode == 0
    assert (run_dir / "report.html").stat().st_size < 3_000_000
    assert len(re.findall("<img", (run_dir / "report.html").read_text())) == len(PLOTS) - 1
