"""Secrets in the environment, in URLs and on the command line do not survive redaction."""

import pytest

from gkd_ds.runtime.redaction import redact, redact_argv, secret_values

CANARY = "canary-7f3a9c-secret"


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        "MY_API_KEY",
        "my_secret",
        "PGPASSWORD",
        "DB_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "AZURE_STORAGE_ACCOUNT_KEY",
        "TOKEN",
        "API_KEY",
        "PASSWORD",
        "secret",
        "SMTP_PASS",
        "MYSQL_PASSWD",
    ],
)
def test_environment_values_are_replaced_everywhere(monkeypatch, name):
    monkeypatch.setenv(name, CANARY)
    value = {"a": [f"x{CANARY}y", 1, None, 2.5], f"key {CANARY}": ({CANARY}, True)}
    clean = redact(value)
    assert clean == {"a": ["x***y", 1, None, 2.5], "key ***": ({"***"}, True)}
    assert CANARY in value["a"][0], "the input must not be changed"


def test_short_values_and_other_names_are_left_alone(monkeypatch):
    monkeypatch.setenv("SHORT_TOKEN", "1234567")
    others = [
        "PLAIN_VALUE",
        "TOKENIZERS_PARALLELISM",
        "TOKENIZER",
        "HTTP_BYPASS",
        "MAX_TOKENS",
        "SECRETARY",
        "MONKEY",
    ]
    for name in [*others, "AWS_ACCESS_KEY_ID", "HF_TOKEN_PATH"]:
        monkeypatch.setenv(name, "plain-value-long-enough")
    assert redact("1234567 plain-value-long-enough") == "1234567 plain-value-long-enough"


def test_a_secret_that_contains_another_leaves_no_rest(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-and-more")
    values = secret_values()
    assert values.index("abcdefgh-and-more") < values.index("abcdefgh")
    assert redact("abcdefgh-and-more") == "***"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://user:pass@host/path", "https://***@host/path"),
        ("https://hf_abc@host", "https://***@host"),
        (
            "git clone https://u:p@ss@host:8080/x.git now",
            "git clone https://***@host:8080/x.git now",
        ),
        ("HTTP_PROXY=http://u:p@proxy:3128", "HTTP_PROXY=http://***@proxy:3128"),
        (
            "s3://key:secret@bucket, mysql+pymysql://root:pw@db/x",
            "s3://***@bucket, mysql+pymysql://***@db/x",
        ),
        ("https://host/path?mail=a@b.c", "https://host/path?mail=a@b.c"),
        ("https://host/@user", "https://host/@user"),
        ("https://host/x?token=abc", "https://host/x?token=***"),
        ("GET /x?page=2&access_token=a.b-c&z=1#top", "GET /x?page=2&access_token=***&z=1#top"),
        (
            "s3?X-Amz-Security-Token=a%2Fb&X-Amz-Signature=0f",
            "s3?X-Amz-Security-Token=***&X-Amz-Signature=***",
        ),
        ("https://maps?api_key=k1&key=k2", "https://maps?api_key=***&key=***"),
        (
            "https://host/?eos_token=</s>&tokenizer=x&max_tokens=5",
            "https://host/?eos_token=</s>&tokenizer=x&max_tokens=5",
        ),
        (
            "https://host/?monkey=1&passage=2 key=3, token=4",
            "https://host/?monkey=1&passage=2 key=3, token=4",
        ),
        ("mail someone@example.org", "mail someone@example.org"),
    ],
)
def test_url_credentials(text, clean):
    assert redact(text) == clean


def test_command_line():
    assert redact_argv(
        ["--hub_token", "abc", "--lr", "1", "--hub-token=abc", "--eos_token", "</s>", "--token=t"]
    ) == [
        "--hub_token",
        "***",
        "--lr",
        "1",
        "--hub-token=***",
        "--eos_token",
        "</s>",
        "--token=***",
    ]
