"""TRL's trainer for direct preference optimisation, whose reference is the base: the same model, adapters off."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TQDM_DISABLE", "1")

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch.nn.functional import logsigmoid
from toy import VOCABULARY, adapted, base_bits, every_method, fill, llama, moved, optimizer, rate, tokens, trained
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

import adapterhub_lite as ah

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

disable_progress_bars()
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # TRL asks for it

BETA = 0.3
PROMPT, ANSWER, PAIRS = 3, 4, 8


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        yield


def tokenizer() -> PreTrainedTokenizerFast:
    """The word "w17" is token 17."""
    words = WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, unk_token="<0>")
    whole = Tokenizer(words)
    # Texts are put together without a space between them.
    whole.pre_tokenizer = Split(Regex(r"<\d+>"), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<0>", bos_token="<1>", eos_token="<2>")


def ids() -> dict[str, Tensor]:
    return {
        "prompt": tokens(PAIRS, PROMPT, seed=1),
        "chosen": tokens(PAIRS, ANSWER, seed=2),
        "rejected": tokens(PAIRS, ANSWER, seed=3),
    }


def preferences() -> Dataset:
    return Dataset.from_dict({k: [" ".join(f"<{i}>" for i in row) for row in t.tolist()] for k, t in ids().items()})


def log_likelihood(model: Any, answers: str) -> Tensor:
    """Of each answer and the token that ends it, given its prompt: (pairs,), in float64."""
    rows = ids()
    x = torch.cat([rows["prompt"], rows[answers], torch.full((PAIRS, 1), 2)], dim=1)
    with torch.no_grad():
        logs = model(input_ids=x).logits.double().log_softmax(-1)[:, PROMPT - 1 : -1]  # those that predict the answer
    return logs.gather(-1, x[:, PROMPT:, None])[..., 0].sum(1)


def margins(policy: Any, reference: Any) -> Tensor:
    """By how much more the policy prefers the chosen answers than the reference does (Rafailov et al. 2023, eq. 7)."""
    chosen, rejected = (log_likelihood(policy, a) - log_likelihood(reference, a) for a in ("chosen", "rejected"))
    return BETA * (chosen - rejected)


def base_of(model: Any) -> Any:
    """The base as a model of its own, which shares the base's tensors: the copy has its own switch."""
    shared = {id(p): p for name, p in model.named_parameters() if ".adapters." not in name}
    twin = copy.deepcopy(model, shared)
    ah.adapt(twin).activate(None)
    return twin


def trainer(model: Any, folder: Path, own: torch.optim.Optimizer, reference: Any = None, **options: Any) -> DPOTrainer:
    config = DPOConfig(
        str(folder),
        beta=BETA,
        per_device_train_batch_size=PAIRS,
        max_steps=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        **options,
    )
    return DPOTrainer(
        model,
        reference,
        config,
        train_dataset=preferences(),
        processing_class=tokenizer(),
        optimizers=(own, None),
    )


def logged(run: DPOTrainer, key: str) -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


@every_method
def test_dpo_against_the_base_itself(tmp_path: Path, method: Any) -> None:
    model, adapters = adapted(method)
    for seed in range(3):
        fill(model, seed=seed)  # it is trained further, so that its first loss is not log 2
    twin = base_of(model)
    before, start = base_bits(model), trained(model)
    want = -logsigmoid(margins(model, llama())).mean().item()
    assert abs(want - torch.tensor(2.0).log().item()) > 1e-2
    run = trainer(model, tmp_path, optimizer(adapters, rate(method)), twin)
    run.train()
    losses = logged(run, "loss")
    assert losses[0] == pytest.approx(want, rel=1e-4)
    assert losses[-1] < 0.9 * losses[0]
    moved(start, trained(model))
    assert base_bits(model) == before
    assert {p.data_ptr() for k, p in twin.named_parameters() if ".adapters." not in k} == {
        p.data_ptr() for k, p in model.named_parameters() if ".adapters." not in k
    }


@every_method
def test_dpo_against_log_likelihoods_that_the_base_gave_before(tmp_path: Path, method: Any) -> None:
    model, adapters = adapted(method)
    fill(model)
    want = -logsigmoid(margins(model, llama())).mean().item()
    own = optimizer(adapters)
    with adapters.using(None):
        run = trainer(model, tmp_path, own, precompute_ref_log_probs=True)
    run.train()
    assert logged(run, "loss")[0] == pytest.approx(want, rel=1e-4)
