"""transformers' Trainer: accumulation, checkpointing of gradients and of the run, and what is saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from toy import adapted, base_bits, bits, every_method, llama, moved, optimizer, same, tokens, trained
from transformers import Trainer, TrainingArguments

import adapterhub_lite as ah

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor, nn

MAX_STEPS = 4


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens(16, 9)]


def trainer(model: nn.Module, folder: Path, own: torch.optim.Optimizer | None = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": MAX_STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "seed": 3,
        "dataloader_pin_memory": False,
        **options,
    }
    return Trainer(model, TrainingArguments(str(folder), **settings), train_dataset=rows(), optimizers=(own, None))


@every_method
@pytest.mark.parametrize("own", [True, False], ids=["our groups", "its optimizer"])
def test_trainer_trains_the_adapter_and_nothing_else(tmp_path: Path, method: Any, own: bool) -> None:
    model, adapters = adapted(method)
    before, start = base_bits(model), trained(model)
    frozen = {k: b for k, b in bits(model).items() if k not in start}
    trainer(model, tmp_path, optimizer(adapters) if own else None).train()
    moved(start, trained(model))
    assert base_bits(model) == before
    assert {k: b for k, b in bits(model).items() if k not in start} == frozen


@every_method
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, method: Any) -> None:
    model, adapters = adapted(method)
    whole = trainer(model, tmp_path / "whole", optimizer(adapters), save_strategy="steps", save_steps=2)
    whole.train()
    again, others = adapted(method)
    halfway = trainer(again, tmp_path / "again", optimizer(others))
    halfway.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert halfway.state.global_step == MAX_STEPS
    assert bits(again) == bits(model)
    third, others = adapted(method)  # from the end: nothing is left to train, so what it has is what was stored
    trainer(third, tmp_path / "third", optimizer(others)).train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4")
    )
    assert bits(third) == bits(model)


@every_method
def test_accumulated_gradients_are_those_of_the_large_batch(tmp_path: Path, method: Any) -> None:
    ends = []
    for batch, parts in ((4, 1), (1, 4)):
        model, adapters = adapted(method)
        start = trained(model)
        sgd = torch.optim.SGD(adapters.param_groups(lr=0.5))  # Adam would hide a gradient that is too large
        trainer(
            model,
            tmp_path,
            sgd,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=parts,
            max_grad_norm=0.0,
        ).train()
        ends.append(trained(model))
        moved(start, ends[-1])
    same(ends[0], ends[1])


@every_method
@pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
def test_checkpointed_gradients_are_the_gradients(tmp_path: Path, method: Any, reentrant: bool) -> None:
    ends, recomputed = [], []
    for checkpointing in (False, True):
        model, adapters = adapted(method)
        if reentrant:  # which drops the gradients of a block none of whose inputs needs one
            model.enable_input_require_grads()
        calls: list[None] = []
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_, calls=calls: calls.append(None))
        trainer(
            model,
            tmp_path,
            optimizer(adapters),
            activation_checkpointing=checkpointing,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        ).train()
        ends.append(trained(model))
        recomputed.append(len(calls))
    assert recomputed == [MAX_STEPS, 2 * MAX_STEPS]  # or nothing was tested
    same(ends[0], ends[1], 0.0)


@every_method
def test_a_trained_adapter_is_saved_and_computes_the_same_elsewhere(tmp_path: Path, method: Any) -> None:
    model, adapters = adapted(method)
    trainer(model, tmp_path / "run", optimizer(adapters)).train()
    adapters.save("a", tmp_path / "a")
    again = llama()
    ah.adapt(again).load(tmp_path / "a", "a")
    x = tokens(2, 7)
    model.eval()
    with torch.no_grad():
        want, base = model(input_ids=x).logits, llama()(input_ids=x).logits
        assert (want - base).abs().max() > 1e-2
        torch.testing.assert_close(again(input_ids=x).logits, want, rtol=1e-5, atol=1e-5)
