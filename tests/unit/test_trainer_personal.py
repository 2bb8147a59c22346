"""What a site keeps for itself, by the real engine: its own adapter and its export, and what waits for a receipt."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from worker_site import Site, added, extend, make_plan, same

from fsllm_client.site import own_adapter
from fsllm_client.site.own_adapter import OwnAdapter, export_own
from fsllm_client.trainer.base_model import load_model
from fsllm_client.trainer.kept import PRIVATE, Kept
from fsllm_client.trainer.orders import Evaluate
from fsllm_client.trainer.tensor_files import read_metadata, read_tensors, write_tensors
from fsllm_common.errors import FsllmError
from fsllm_common.plan import canonical_json

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_a_sites_own_adapter_is_exported_as_peft_loads_it(
    site: Callable[..., Site], tiny_model: Path, tmp_path: Path
) -> None:
    plan = make_plan(algorithm={"name": "ditto"}, evaluate={"limit": 4, "every": 0})
    one = site(plan)
    keep, base, out, told = one.folder / "keep", one.build(), one.folder / "exported", tmp_path / "plan.json"
    keep.mkdir()
    told.write_bytes(canonical_json(plan))
    with pytest.raises(FsllmError, match="no adapter of its own for this run yet"):
        export_own(keep, told, out, force=False)
    delta = one.train(base, keep=keep)
    assert export_own(keep, told, out, force=False) == OwnAdapter(len(delta), version=0, round=1)
    with pytest.raises(FsllmError, match="--force"):
        export_own(keep, told, out, force=False)
    export_own(keep, told, out, force=True)

    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(tiny_model, torch.float32), out)
    loaded = {name.replace(".default.", "."): p for name, p in model.named_parameters() if "lora" in name}
    own = read_tensors(keep / "private-00000001.safetensors")
    assert same({f"rule/{name}": p.detach() for name, p in loaded.items()}, own)

    following = added(one.folder, base, delta)
    loss = one.session.carry_out(Evaluate(adapter=following, version=1, resume=keep)).metrics["loss"]
    shared = one.session.carry_out(Evaluate(adapter=following, version=1)).metrics["loss"]
    assert loss != pytest.approx(shared, rel=1e-6)
    assert export_own(keep, told, out, force=True) == OwnAdapter(len(delta), version=1, round=1)
    one.session.carry_out(Evaluate(adapter=following, version=4, resume=keep))
    assert export_own(keep, told, out, force=True).round == 4


def test_an_own_adapter_after_training_is_made_of_the_version_that_was_trained_from(
    site: Callable[..., Site],
) -> None:
    one = site(make_plan(algorithm={"name": "fedsa-lora"}))
    keep, base = one.folder / "keep", one.build()
    one.train(base, 3, keep=keep)
    left, start = read_tensors(keep / own_adapter.FILE), read_tensors(base)
    own = read_tensors(keep / "private-00000003.safetensors")
    assert same({f"own/{name}": tensor for name, tensor in left.items() if "lora_B" in name}, own)
    assert not same({f"own/{name}": tensor for name, tensor in start.items() if "lora_B" in name}, own)
    assert all(torch.equal(tensor, start[name]) for name, tensor in left.items() if "lora_A" in name)
    assert read_metadata(keep / own_adapter.FILE).items() >= {"version": "2", "round": "3"}.items()


@pytest.mark.parametrize("name", ["fedavg", "scaffold"])
def test_methods_with_one_model_for_all_leave_no_adapter(name: str, site: Callable[..., Site]) -> None:
    one = site(make_plan(algorithm={"name": name, "parameters": {"sites": 3} if name == "scaffold" else {}}))
    keep, base = one.folder / "keep", one.build()
    extend(base, name, one.plan)
    one.train(base, keep=keep)
    one.session.carry_out(Evaluate(adapter=base, resume=keep))
    assert not (keep / own_adapter.FILE).exists()


def test_fedalt_can_be_measured_and_exported_before_it_was_trained(site: Callable[..., Site], tmp_path: Path) -> None:
    """As where its first round was withdrawn: the own LoRA and the rest's are both the version's."""
    one = site(make_plan(algorithm={"name": "fedalt"}))
    keep, base = one.folder / "keep", one.build()
    keep.mkdir()
    extend(base, "fedalt", one.plan)
    one.session.carry_out(Evaluate(adapter=base, resume=keep))
    (tmp_path / "plan").write_bytes(canonical_json(one.plan))
    out = tmp_path / "out"
    assert export_own(keep, tmp_path / "plan", out, force=False).mixed
    own, rest = (read_tensors(folder / "adapter_model.safetensors") for folder in (out, out / "rest"))
    assert same(own, rest, 0.0)
    with pytest.raises(FsllmError, match=r"holds .*rest, mixer\.safetensors already"):
        export_own(keep, tmp_path / "plan", out, force=False)
    # Over it, a method with one adapter leaves nothing of the mixture.
    (other := one.folder / "other").mkdir()
    write_tensors(other / own_adapter.FILE, read_tensors(base), own_adapter.facts("{}", 1, 1))
    assert not export_own(other, tmp_path / "plan", out, force=True).mixed
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_fedalt_measures_a_version_beside_what_training_would_take_from_it(site: Callable[..., Site]) -> None:
    one = site(make_plan(algorithm={"name": "fedalt"}))
    keep, base = one.folder / "keep", one.build()
    extend(base, "fedalt", one.plan)
    delta = one.train(base, 1, keep=keep)
    start = read_tensors(base)
    version = {n: t + 0.5 * delta.get(n, t * 0) + (0.1 if "lora" in n else 0.0) for n, t in start.items()}
    write_tensors(base, {**version, "scalars/updates": torch.full((1,), 2.0)})
    own = {name: start[name] + moved for name, moved in delta.items() if name in start and "lora" in name}
    for number, rest in ((1, {n: 2 * version[n] - own[n] for n in own}), (2, {n: version[n] for n in own})):
        rule, adapter = one.session._evaluated(
            Evaluate(adapter=base, version=number, resume=keep), one.session._prepared()
        )
        assert same(dict(adapter), own, 1e-7), "its own, whether it was in the round or not"
        assert same(rule._rest, rest, 1e-6), number


def test_scaffolds_control_variate_counts_when_the_server_has_its_update(site: Callable[..., Site]) -> None:
    plan = make_plan(algorithm={"name": "scaffold", "parameters": {"sites": 3}})
    lucky, refused = site(plan), site(plan)
    base = lucky.build()
    extend(base, "scaffold", plan)
    second = {}
    for one in (lucky, refused):
        keep = one.folder / "keep"
        first = one.train(base, 1, keep=keep)
        if one is lucky:
            Kept(keep, PRIVATE).acknowledge(1)
        second[one] = one.train(base, 2, keep=keep)
    own = {name: tensor for name, tensor in first.items() if name.startswith("control/")}
    fresh = {name: second[refused][name] for name in own}
    # One takes the first round's c_k off every gradient, and sends what has changed since; the other begins with 0.
    assert same({name: second[lucky][name] + own[name] for name in own}, fresh, 1e-6)
    assert not same(second[lucky], second[refused], 1e-5)


@pytest.mark.parametrize("name", ["ditto", "fedrep", "scaffold"])
def test_a_personal_round_can_be_trained_again_and_goes_on_in_another_worker(
    name: str, site: Callable[..., Site]
) -> None:
    plan = make_plan(algorithm={"name": name, "parameters": {"sites": 3} if name == "scaffold" else {}}, rounds=3)
    one = site(plan)
    keep, base = one.folder / "keep", one.build()
    extend(base, name, plan, 1e-3)
    for number in (1, 2, 3):
        third = one.train(base, number, keep=keep)
        Kept(keep, PRIVATE).acknowledge(number)
    files = sorted(keep.glob("private-*"))
    assert [file.name for file in files] == ["private-00000002.safetensors", "private-00000003.safetensors"]
    kept = read_tensors(files[1])
    files[1].unlink()
    again, forgetful = site(plan), site(plan)
    assert same(again.train(base, 3, keep=keep), third)
    Kept(keep, PRIVATE).acknowledge(3)
    assert same(read_tensors(files[1]), kept)
    without = forgetful.train(base, 3, keep=forgetful.folder / "keep")
    Kept(forgetful.folder / "keep", PRIVATE).acknowledge(3)
    left = read_tensors(forgetful.folder / "keep" / files[1].name)
    assert not (same(without, third, 1e-6) and same(left, kept, 1e-6))
