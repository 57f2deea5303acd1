"""Data: what goes in, and looking at it."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.scripts.library import IS_TRL, GKDTrainer, chats, quick


def look_at_a_batch(home: Path) -> None:
    """TRL's keys, decoded."""
    trainer = quick(home, eval_dataset=chats(3, seed=1))
    loader = trainer.get_train_dataloader()
    assert len(loader) == 3 and trainer.num_examples(loader) == 6
    batch = next(iter(loader))
    wanted = {"input_ids", "attention_mask", "labels", "prompts", "prompt_attention_mask"}
    assert wanted <= batch.keys()
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    tokenizer = trainer.processing_class
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        answer = tokenizer.decode(ids[labels != -100], skip_special_tokens=True)
        assert answer.strip() and answer.strip() in tokenizer.decode(ids)
    for prompt, mask in zip(batch["prompts"], batch["prompt_attention_mask"]):
        assert tokenizer.decode(prompt[mask.bool()]).endswith("<|im_start|>assistant\n")
    sizes = [len(batch["input_ids"]) for batch in trainer.get_eval_dataloader()]
    assert sizes == [2, 1]
    assert len(trainer.get_test_dataloader(chats(4, seed=2))) == 2


def map_to_messages(home: Path) -> None:
    """Columns of another shape, mapped first."""
    from datasets import Dataset

    raw = Dataset.from_dict({"question": ["2 plus 2?", "3 plus 3?"], "answer": ["4.", "6."]})
    data = raw.map(
        lambda row: {"messages": [{"role": "user", "content": row["question"]},
                                  {"role": "assistant", "content": row["answer"]}]},
        remove_columns=raw.column_names,
    )  # fmt: skip
    quick(home, train_dataset=data).train()


def other_columns(home: Path) -> None:
    """Columns that nobody reads do no harm."""
    data = chats().add_column("source", ["web"] * 6).add_column("score", [0.5] * 6)
    quick(home, train_dataset=data).train()


def a_collator_of_my_own(home: Path) -> None:
    """TRL's keys, made by the caller: every answer in capitals."""
    holder = {}

    def collate(rows):
        tokenizer = holder["tokenizer"]
        prompts, answers = [], []
        for row in rows:
            *prompt, last = row["messages"]
            prompts.append(
                tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            )
            answers.append(last["content"].upper() + tokenizer.eos_token)
        ids = [tokenizer(p, add_special_tokens=False).input_ids for p in prompts]
        ends = [tokenizer(a, add_special_tokens=False).input_ids for a in answers]
        width = max(len(p) + len(a) for p, a in zip(ids, ends))
        longest = max(map(len, ids))
        batch = {"input_ids": [], "attention_mask": [], "labels": []}
        batch |= {"prompts": [], "prompt_attention_mask": []}
        for p, a in zip(ids, ends):
            fill = width - len(p) - len(a)
            batch["input_ids"].append([tokenizer.pad_token_id] * fill + p + a)
            batch["attention_mask"].append([0] * fill + [1] * len(p + a))
            batch["labels"].append([-100] * (fill + len(p)) + a)
            batch["prompts"].append([tokenizer.pad_token_id] * (longest - len(p)) + p)
            batch["prompt_attention_mask"].append([0] * (longest - len(p)) + [1] * len(p))
        return {name: torch.tensor(rows) for name, rows in batch.items()}

    from transformers import AutoTokenizer

    holder["tokenizer"] = AutoTokenizer.from_pretrained(home / "student")
    trainer = quick(home, data_collator=collate, lmbda=0.0, eval_dataset=chats(2, seed=1))
    trainer.train()
    assert trainer.data_collator is not None and "eval_loss" in trainer.evaluate()
    if not IS_TRL:
        batch = next(iter(trainer.get_train_dataloader()))
        answer = batch["input_ids"][0][batch["labels"][0] != -100]
        text = trainer.processing_class.decode(answer, skip_special_tokens=True)
        assert text == text.upper() and text.strip()


def static_methods(home: Path) -> None:
    """Both of TRL's, on tensors and a model."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    logits = torch.randn(2, 5, 10)
    assert float(GKDTrainer.generalized_jsd_loss(logits, logits)) < 1e-6
    labels = torch.tensor([[-100, 1, 2, 3, 4], [-100, -100, 1, 2, 3]])
    loss = GKDTrainer.generalized_jsd_loss(logits, torch.randn(2, 5, 10), labels=labels, beta=0.3)
    assert loss.ndim == 0 and loss > 0
    model = AutoModelForCausalLM.from_pretrained(home / "student")
    prompts = torch.tensor([[5, 6, 7], [8, 9, 10]])
    inputs = {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
    config = GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    ids, mask, labels = GKDTrainer.generate_on_policy_outputs(model, inputs, config)
    assert ids.shape == mask.shape == labels.shape and (labels[:, :3] == -100).all()


def the_generation_config(home: Path) -> None:
    """As TRL's own tests look at it."""
    trainer = quick(home, temperature=0.7, max_new_tokens=5)
    config = trainer.generation_config
    assert config.pad_token_id == trainer.processing_class.pad_token_id
    assert config.eos_token_id == trainer.model.generation_config.eos_token_id
    assert (config.max_new_tokens, config.temperature, config.top_k) == (5, 0.7, 0)


def long_rows(home: Path) -> None:
    """max_length cuts completions."""
    quick(home, max_length=120).train()


def rows_made_on_the_fly(home: Path) -> None:
    """set_transform, from other columns and over the same."""
    from datasets import Dataset

    def answered(batch):
        return {
            "messages": [
                [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes."}]
                for question in batch["question"]
            ]
        }

    data = Dataset.from_dict({"question": ["Red?", "Blue?"] * 2})
    data.set_transform(answered)
    trainer = quick(home, train_dataset=data)
    trainer.train()
    data = chats(4).with_transform(lambda batch: answered({"question": ["Red?"] * 4}))
    trainer = quick(home, train_dataset=data, output_dir="other", per_device_train_batch_size=4)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len({tuple(row) for row in batch["input_ids"].tolist()}) == 1


def the_collator_itself(home: Path) -> None:
    """trainer.data_collator, called on rows."""
    trainer = quick(home)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in (0, 3)])
    assert len(batch["input_ids"]) == len(batch["prompts"]) == 2
    shown = trainer.processing_class.decode(batch["input_ids"][1])
    assert trainer.train_dataset[3]["messages"][-1]["content"] in shown
