"""A rank's orders, carried out in this process by the real engine on the tiny model."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from worker_site import Site, added, make_plan, same

from fsllm_client.data.batches import TrainingBatches
from fsllm_client.data.site_data import load_site_data
from fsllm_client.trainer.adapters import adapter_parameters, attach
from fsllm_client.trainer.answers import token_losses
from fsllm_client.trainer.base_model import load_model, load_tokenizer
from fsllm_client.trainer.group import Group
from fsllm_client.trainer.orders import Account
from fsllm_client.trainer.session import Session
from fsllm_client.trainer.tensor_files import read_metadata, read_tensors, write_tensors
from fsllm_common.algorithms import algorithm_class
from fsllm_common.errors import FsllmError

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("packing", [True, False])
def test_a_round_is_plain_torchs_on_the_mean_over_all_answer_tokens_of_a_step(
    packing: bool, site: Callable[..., Site], tiny_model: Path, tiny_rows: Path
) -> None:
    plan = make_plan(train={"optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0}, data={"packing": packing})
    one = site(plan)
    base = one.build()
    delta = one.train(base, 3)

    tokenizer = load_tokenizer(tiny_model)
    data = load_site_data(tiny_rows, plan, tokenizer, "site")
    # The reference looks at each example alone: that packing changes nothing is part of what is tested.
    from fsllm_client.data.packing import arrange

    rows = arrange(data.train, packed=packing, max_length=24, seed=11)
    batches = TrainingBatches(rows, packed=packing, batch_size=6, pad=2, seed=11, round_number=3)
    model = attach(plan, load_model(tiny_model, torch.float32)).train()
    parameters = adapter_parameters(model)
    start = read_tensors(base)
    for name, parameter in parameters.items():
        parameter.data.copy_(start[name])
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    losses, tokens = [], []
    for step, _ in zip(batches, range(2), strict=False):
        optimizer.zero_grad()
        (batch,) = step.micro_batches
        inputs = dict(batch.inputs)
        labels = inputs.pop("labels")
        summed = token_losses(model(**inputs).logits, labels)
        (summed / int((labels != -100).sum())).backward()
        optimizer.step()
        losses.append(float(summed))
        tokens.append(int((labels != -100).sum()))
    expected = {name: parameter.detach() - start[name] for name, parameter in parameters.items()}

    assert same(delta, expected, 2e-6)
    assert max(float(t.abs().max()) for t in delta.values()) > 1e-3
    assert one.finished.metrics["train_loss"] == pytest.approx(sum(losses) / sum(tokens), rel=1e-5)
    assert one.finished.counts == {"examples": len(data.train), "tokens": sum(tokens), "steps": 2}
    assert one.prepared.counts["sequences"] == len(rows)
    assert (len(rows) < len(data.train)) == packing


def test_the_size_of_a_micro_batch_changes_nothing(site: Callable[..., Site]) -> None:
    deltas = []
    for micro in (1, 4, None):
        one = site(make_plan(data={"packing": False}, train={"micro_batch_size": micro, "optimizer": "sgd"}))
        deltas.append(one.train(one.build()))
    assert same(deltas[0], deltas[1], 1e-6)
    assert same(deltas[0], deltas[2], 1e-6)


def test_version_0_has_the_same_bits_whatever_the_site_trains_with(site: Callable[..., Site]) -> None:
    plain = site(make_plan("dora", 1)).build()
    other = site(make_plan("dora", 3, train={"precision": "bf16"})).build()
    assert plain.read_bytes() == other.read_bytes()
    assert json.loads(read_metadata(plain)["adapter_config"])["use_dora"] is True


def test_an_evaluation_between_two_rounds_changes_neither(site: Callable[..., Site]) -> None:
    plan = make_plan(train={"optimizer_state": "keep"}, adapter={"dropout": 0.2})
    deltas = []
    for evaluates in (False, True):
        one = site(plan)
        base = one.build()
        first = one.train(base, 1, keep=one.folder / "keep")
        following = added(one.folder, base, first)
        if evaluates:
            one.evaluate(base)
        deltas.append(one.train(following, 2, keep=one.folder / "keep"))
    assert same(*deltas)


def test_a_kept_optimizer_outlives_the_worker_and_a_round_can_be_trained_again(site: Callable[..., Site]) -> None:
    plan = make_plan(train={"optimizer_state": "keep"}, adapter={"dropout": 0.2})
    one = site(plan)
    keep = one.folder / "keep"
    base = one.build()
    following = added(one.folder, base, one.train(base, 1, keep=keep))
    second = one.train(following, 2, keep=keep)

    again = site(plan)  # another process, as far as the engine can tell
    assert same(again.train(following, 2, keep=keep), second)
    forgetful = site(make_plan(adapter={"dropout": 0.2}))
    assert not same(forgetful.train(following, 2), second, 1e-4)
    assert not same(again.train(following, 3, keep=keep), second, 1e-4)  # another round, other batches
    assert len(list(keep.iterdir())) == 2


def test_a_round_that_trains_nothing_reports_no_loss(site: Callable[..., Site]) -> None:
    one = site(make_plan(algorithm={"name": "fedask"}))
    base, keep = one.build(), one.folder / "keep"
    zero = read_tensors(base)
    extra = algorithm_class("fedask")(one.plan).extra({name: tuple(zero[name].shape) for name in zero})  # noqa: S610
    write_tensors(base, zero | {name: torch.from_numpy(array) for name, array in extra.items()})
    one.train(base, 1, keep=keep)
    assert one.finished.metrics["train_loss"] > 0
    one.train(base, 2, keep=keep)
    assert (one.finished.counts["tokens"], "train_loss" in one.finished.metrics) == (0, False)


def test_what_is_done_ahead_of_a_round_changes_none_of_its_bits(site: Callable[..., Site]) -> None:
    plan = make_plan(train={"optimizer_state": "keep"}, adapter={"dropout": 0.2})
    deltas = []
    for ahead in (False, True):
        one = site(plan)
        keep = one.folder / "keep"
        base = one.build()
        following = added(one.folder, base, one.train(base, 1, keep=keep))
        if ahead:
            one.session.look_ahead()
            one.evaluate(base)
            for file in keep.iterdir():
                file.rename(file.with_suffix(".away"))  # what is needed of it is in the engine
        deltas.append(one.train(following, 2, keep=keep))
        if ahead:
            for file in keep.glob("*.away"):
                file.rename(file.with_suffix(".safetensors"))
            # A round that is trained again starts from the state before it, not from the one that lies ready.
            one.session.look_ahead()
            deltas.append(one.train(following, 2, keep=keep))
    assert same(deltas[0], deltas[1])
    assert same(deltas[0], deltas[2])


def test_the_head_is_given_the_answers_alone(site: Callable[..., Site]) -> None:
    one = site(make_plan(data={"packing": True}, evaluate={"metrics": ["loss"]}))
    base = one.build()
    given: list[int] = []
    head = one.session._run.engine.model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda module, arguments, output: given.append(output.shape[:-1].numel()))
    one.train(base)
    assert sum(given) == one.finished.counts["tokens"]
    given.clear()
    assert one.evaluate(base).counts["tokens"] == sum(given)


def test_a_reset_optimizer_knows_nothing_of_the_rounds_before(site: Callable[..., Site]) -> None:
    plan = make_plan()
    one, fresh = site(plan), site(plan)
    base = one.build()
    one.train(base, 1)
    assert same(one.train(base, 2), fresh.train(base, 2))


@pytest.mark.parametrize("stage", [2, 3])
def test_a_round_that_diverges_is_given_up_and_the_next_is_sound(stage: int, site: Callable[..., Site]) -> None:
    one, fresh = site(make_plan(stage=stage)), site(make_plan(stage=stage))
    base = one.build()
    spoilt = one.folder / "spoilt.safetensors"
    write_tensors(spoilt, {name: torch.full_like(t, 1e30) for name, t in read_tensors(base).items()})
    with pytest.raises(FsllmError, match="round 1, step 1 of 2") as caught:
        one.train(spoilt)
    assert caught.value.reason == "LOSS_NOT_FINITE"
    assert not (one.folder / "delta-1.safetensors").exists()
    assert same(one.train(base), fresh.train(base))


def test_an_order_that_is_no_longer_wanted_ends_at_its_next_step(site: Callable[..., Site]) -> None:
    one, fresh = site(make_plan()), site(make_plan())
    base = one.build()
    one.unwanted = True
    for order in (lambda: one.train(base), lambda: one.evaluate(base)):
        with pytest.raises(FsllmError) as caught:
            order()
        assert caught.value.reason == "ORDER_UNKNOWN"
    one.unwanted = False
    assert same(one.train(base), fresh.train(base))


def test_the_loss_measured_is_the_mean_over_the_validation_rows_tokens(
    site: Callable[..., Site], tiny_model: Path, tiny_rows: Path
) -> None:
    plan = make_plan(train={"micro_batch_size": 2}, evaluate={"limit": 5})
    one = site(plan)
    base = added(one.folder, one.build(), one.train(one.build()))
    found = one.evaluate(base)

    data = load_site_data(tiny_rows, plan, load_tokenizer(tiny_model), "site")
    assert len(data.validation) > 5
    model = attach(plan, load_model(tiny_model, torch.float32)).eval()
    for name, parameter in adapter_parameters(model).items():
        parameter.data.copy_(read_tensors(base)[name])
    summed, tokens = 0.0, 0
    for example in data.validation[:5]:
        logits = model(input_ids=torch.tensor(example.input_ids[None].astype("int64"))).logits
        summed += float(token_losses(logits, torch.tensor(example.labels[None].astype("int64"))))
        tokens += example.answer_tokens
    assert found.metrics["loss"] == pytest.approx(summed / tokens, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(summed / tokens), rel=1e-4)
    assert found.counts == {"examples": 5, "tokens": tokens}
    assert one.reports[-1].activity == "evaluating"
    assert (one.reports[-1].done, one.reports[-1].total) == (5, 5)


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt"])
def test_exact_match_counts_the_answers_that_the_model_really_gives(
    kind: str, site: Callable[..., Site], tmp_path: Path, tiny_model: Path, tiny_rows: Path
) -> None:
    plan = make_plan(kind, evaluate={"metrics": ["exact_match"], "max_new_tokens": 6})
    base = site(plan).build()
    base_tensors = read_tensors(base)
    generator = torch.Generator().manual_seed(2)
    write_tensors(base, {name: t + 0.2 * torch.randn(t.shape, generator=generator) for name, t in base_tensors.items()})
    model = attach(plan, load_model(tiny_model, torch.float32)).eval()
    for name, parameter in adapter_parameters(model).items():
        parameter.data.copy_(read_tensors(base)[name])
    tokenizer = load_tokenizer(tiny_model)
    rows = []
    for number, prompt in enumerate(["a=", "abcdef=", "hello", "qq", "x y z", "12"]):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer: list[int] = []
        for _ in range(6):  # one at a time, and everything computed anew
            now = torch.tensor([ids + answer])
            token = int(
                model(input_ids=now, attention_mask=torch.ones_like(now), use_cache=False).logits[0, -1].argmax()
            )
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        assert text.strip()
        rows.append({"prompt": prompt, "completion": text if number % 3 else "never said"})
    path = tmp_path / "held-out.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    found = site(plan, rows=path, role="evaluator").evaluate(base)

    assert found.metrics["exact_match"] == pytest.approx(4 / 6)
    assert found.counts["answers"] == 6
    assert "loss" not in found.metrics


def test_sequences_are_not_packed_for_adapters_that_only_a_first_example_would_see(
    site: Callable[..., Site],
) -> None:
    one = site(make_plan("prompt"))
    assert one.prepared.counts["sequences"] == one.prepared.counts["train_rows"]
    assert any("not packed" in note for note in one.prepared.notes)


def test_what_can_not_be_prepared_is_said_with_its_reason(
    site: Callable[..., Site], tmp_path: Path, tiny_model: Path
) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"prompt": "secret", "completion"')
    settings = tmp_path / "ds.json"
    settings.write_text("{")
    cases: list[tuple[str, Callable[[], Site]]] = [
        ("MODEL_MISSING", lambda: site(make_plan(), model=tmp_path / "absent")),
        ("MODEL_UNSUITABLE", lambda: site(make_plan(adapter={"targets": ["c_attn"]}))),
        ("DATA_INVALID", lambda: site(make_plan(), rows=broken)),
        ("SETTING_INVALID", lambda: site(make_plan(), deepspeed_config=settings)),
    ]
    for reason, prepare in cases:
        with pytest.raises(FsllmError) as caught:
            prepare()
        assert caught.value.reason == reason
        assert "secret" not in str(caught.value)


def test_an_adapter_of_another_shape_is_refused_by_the_tensors_name(site: Callable[..., Site]) -> None:
    one = site(make_plan())
    tensors = read_tensors(one.build())
    name = next(iter(tensors))
    other = one.folder / "other.safetensors"
    write_tensors(other, {**tensors, name: tensors[name][:1]})
    with pytest.raises(FsllmError, match=r"1 tensors differ") as caught:
        one.evaluate(other)
    assert caught.value.reason == "MANIFEST_INVALID"
    assert name in caught.value.message


def test_the_sites_json_is_used_and_what_it_may_not_say_is_noted(site: Callable[..., Site], tmp_path: Path) -> None:
    settings = tmp_path / "ds.json"
    settings.write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "fp16": {}})
    )
    plan = make_plan(stage=1, train={"optimizer": "sgd"})
    partitioned, whole = site(plan, deepspeed_config=settings), site(plan)
    assert any("fp16" in note for note in partitioned.prepared.notes)
    assert partitioned.session._run.engine.stage == 3
    base = whole.build()
    assert same(partitioned.train(base), whole.train(base), 1e-6)


def test_epsilon_needs_no_preparation() -> None:
    def never() -> Group:
        raise AssertionError

    session = Session(never, lambda _: None, bool)
    assert session.carry_out(Account(multiplier=10, releases=100, delta=1e-5)).metrics["epsilon"] > 0
