"""Methods that aggregate LoRA's products: what each site's weights gain in a round, beside the mean of the products."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lora_federation import DIFFERENT, EXAMPLES, MODULES, SAME, SHARES, Federation, error, make_plan, product

from fsllm.v1.tensors_pb2 import ELEMENT_TYPE_FLOAT32
from fsllm_common.algorithms import algorithm_class
from fsllm_common.algorithms.hetlora import product_norm
from fsllm_common.algorithms.layers import scale, truncated_svd
from fsllm_common.tensors.arrays import encode
from fsllm_server.engine.making import Maker
from fsllm_server.engine.state import Version
from fsllm_server.reduce.blocks import Source
from fsllm_server.store.blobs import Blobs, StoredVersion


@pytest.mark.parametrize("kind", ["lora", "rslora"])
@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        ("ffa-lora", SAME),
        ("rolora", SAME),
        ("flora", SAME),
        ("flora", DIFFERENT),
        ("rac-lora", SAME),
        ("rac-lora", DIFFERENT),
        ("fedex-lora", SAME),
    ],
)
def test_every_site_gains_the_mean_of_the_products(
    tmp_path: Path, name: str, ranks: tuple[int, ...], kind: str
) -> None:
    several = {} if len(set(ranks)) > 1 else {"ranks": ()}
    federation = Federation(tmp_path, make_plan(name, adapter={"kind": kind, **several}), ranks)
    for _ in range(3):
        exact = federation.round()
        for rank in set(ranks):
            assert error(federation.gained(rank), exact) < 2e-6


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("ffa-lora", "rolora", "fedex-lora") for kind in ("lora", "rslora")),
        ("fed-sb", "lora-xs"),
    ],
)
def test_of_different_ranks_the_largest_has_the_mean_of_the_products_and_others_its_first_terms(
    tmp_path: Path, name: str, kind: str
) -> None:
    federation = Federation(tmp_path, make_plan(name, adapter={"kind": kind}), DIFFERENT)
    for _ in range(4):
        exact = federation.round()
        assert error(federation.gained(4), exact) < 2e-6
        whole = federation.received(4)
        for rank in (2, 1):
            own = federation.received(rank)
            for module in MODULES:
                terms = scale(federation.plan, 4) * product(whole, module, rank)
                assert np.linalg.norm(terms) > 1e-3
                np.testing.assert_allclose(scale(federation.plan, rank) * product(own, module), terms, atol=1e-5)


@pytest.mark.parametrize("ranks", [SAME, DIFFERENT])
def test_fedit_is_biased_and_fair_is_less_so(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    errors = {}
    for name in ("fedit", "lora-fair", "fedex-lora"):
        (tmp_path / name).mkdir()
        adapter = {"ranks": ()} if ranks == SAME else {}
        federation = Federation(tmp_path / name, make_plan(name, adapter=adapter), ranks)
        exact = federation.round()
        errors[name] = error(federation.gained(4), exact)
    assert errors["fedit"] > 0.2
    assert errors["lora-fair"] < 0.95 * errors["fedit"]
    assert errors["fedex-lora"] < 2e-6


@pytest.mark.parametrize("ranks", [SAME, DIFFERENT])
@pytest.mark.parametrize("name", ["flexlora", "hlora"])
def test_flexlora_is_the_truncated_svd_of_the_dense_mean_at_every_rank(
    tmp_path: Path, name: str, ranks: tuple[int, ...]
) -> None:
    federation = Federation(tmp_path, make_plan(name), ranks)
    for _ in range(2):
        exact = federation.round()
        for rank in set(ranks):
            best = {}
            for module, dense in exact.items():
                left, values, right = np.linalg.svd(dense, full_matrices=False)
                best[module] = (left[:, :rank] * values[:rank]) @ right[:rank]
            assert error(federation.gained(rank), best) < 2e-6


def test_flexlora_is_exact_where_the_rank_is_full(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make_plan("flexlora", adapter={"rank": 7, "ranks": ()}), (7, 7, 7))
    exact = federation.round()
    assert error({"model.v_proj": federation.gained(7)["model.v_proj"]}, {"model.v_proj": exact["model.v_proj"]}) < 2e-6


@pytest.mark.parametrize("ranks", [SAME, DIFFERENT])
def test_fedask_at_full_sketch_is_the_truncated_svd_of_the_mean(tmp_path: Path, ranks: tuple[int, ...]) -> None:
    federation = Federation(tmp_path, make_plan("fedask"), ranks, seed=3)
    for _ in range(2):
        federation.sketched = []
        local, exact = [], {module: np.zeros(shape) for module, shape in MODULES.items()}
        for site, rank in enumerate(ranks):
            trained = {}
            for module, (m, n) in MODULES.items():
                b, a = federation.random.normal(size=(m, rank)), federation.random.normal(size=(rank, n))
                trained[f"{module}.lora_A.weight"] = a.astype(np.float32)
                trained[f"{module}.lora_B.weight"] = b.astype(np.float32)
                exact[module] += EXAMPLES[site] / sum(EXAMPLES) * scale(federation.plan, rank) * b @ a
            local.append(trained)
        federation.ask(local)
        # 12 columns: as many as the matrices have, or as the sites' ranks add up to.
        best = {}
        for module, dense in exact.items():
            left, values, right = np.linalg.svd(dense, full_matrices=False)
            best[module] = (left[:, :4] * values[:4]) @ right[:4]
        assert error(federation.gained(4), best) < 2e-6


def test_fedask_sends_sketches_as_they_are_in_every_pair_so_that_a_clip_acts_on_these(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make_plan("fedask", adapter={"ranks": ()}), SAME, seed=3)
    for pair in range(3):
        federation.sketched = []
        size = 10.0**-pair
        local = [
            {
                name: (size * federation.random.normal(size=array.shape)).astype(np.float32)
                for name, array in federation.received(4).items()
                if not name.startswith("sketch/")
            }
            for _ in SAME
        ]
        test_matrix = federation.received(4)["sketch/model.q_proj.lora_O"].astype(np.float64)
        federation.ask(local)
        for site, trained in enumerate(local):
            a, b = (trained[f"model.q_proj.lora_{key}.weight"].astype(np.float64) for key in "AB")
            sent = federation.sent[2 * pair + 1, site]
            assert sent.keys() == {f"sketch/{module}.lora_Y" for module in MODULES}
            wanted = scale(federation.plan, 4) * b @ (a @ test_matrix)
            np.testing.assert_allclose(sent["sketch/model.q_proj.lora_Y"], wanted, rtol=1e-5, atol=1e-6 * size**2)


def test_fedask_with_a_narrow_sketch_is_not_exact(tmp_path: Path) -> None:
    plan = make_plan("fedask", adapter={"rank": 1, "ranks": ()}, parameters={"oversampling": 0})
    federation = Federation(tmp_path, plan, (1, 1, 1), seed=3)
    local = [
        {name: federation.random.normal(size=array.shape).astype(np.float32) for name, array in base.items()}
        for base in [{k: v for k, v in federation.received(1).items() if not k.startswith("sketch/")}] * 3
    ]
    federation.ask(local)
    module = "model.q_proj"
    exact = sum(
        count / sum(EXAMPLES) * 6.0 * trained[f"{module}.lora_B.weight"] @ trained[f"{module}.lora_A.weight"]
        for count, trained in zip(EXAMPLES, local, strict=True)
    )
    best = np.linalg.svd(exact, compute_uv=False)
    assert np.linalg.norm(federation.gained(1)[module] - exact) > 1.001 * np.linalg.norm(best[1:])


@pytest.mark.parametrize("name", ["hetlora", "fedit"])
def test_zero_padding_by_hand(tmp_path: Path, name: str) -> None:
    federation = Federation(tmp_path, make_plan(name), DIFFERENT)
    locals_ = federation.send(lambda site, name, received: federation.random.normal(size=received.shape, scale=0.3))
    module = "model.q_proj"
    norms = [
        scale(federation.plan, rank)
        * np.linalg.norm(mine[f"{module}.lora_B.weight"].astype(np.float64) @ mine[f"{module}.lora_A.weight"])
        for rank, mine in zip(DIFFERENT, locals_, strict=True)
    ]
    shares = [norm / sum(norms) for norm in norms] if name == "hetlora" else SHARES
    a, b = np.zeros((4, 12)), np.zeros((10, 4))
    for rank, share, mine in zip(DIFFERENT, shares, locals_, strict=True):
        a[:rank] += share * mine[f"{module}.lora_A.weight"]
        b[:, :rank] += share * scale(federation.plan, rank) / 1.5 * mine[f"{module}.lora_B.weight"]
    found = federation.received(4)
    np.testing.assert_allclose(found[f"{module}.lora_A.weight"], a, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[f"{module}.lora_B.weight"], b, rtol=1e-5, atol=1e-6)
    two = federation.received(2)
    np.testing.assert_allclose(two[f"{module}.lora_A.weight"], a[:2], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(3.0 * two[f"{module}.lora_B.weight"], 1.5 * b[:, :2], rtol=1e-5, atol=1e-6)


def test_fed_sb_averages_r_alone_and_is_exact(tmp_path: Path) -> None:
    federation = Federation(tmp_path, make_plan("fed-sb", adapter={"kind": "lora-xs", "ranks": ()}), SAME)
    exact = federation.round()
    found = federation.received(4)
    for module in MODULES:
        b, r, a = (found[f"{module}.lora_{key}.weight"].astype(np.float64) for key in "BRA")
        assert error({module: scale(federation.plan, 4) * b @ r @ a}, {module: exact[module]}) < 2e-6


def test_memory_is_that_of_one_module(tmp_path: Path) -> None:
    """Eight sites with 64 modules of 256 KiB: 128 MiB of uploads, and a module of them in memory."""
    plan = make_plan("flexlora", adapter={"rank": 16, "ranks": ()})
    algorithm = algorithm_class("flexlora")(plan)
    random = np.random.default_rng(0)
    names = [f"m{at:02d}.lora_{key}.weight" for at in range(64) for key in "AB"]
    shapes = {name: (16, 2048) if "lora_A" in name else (2048, 16) for name in names}

    def stored(name: str) -> StoredVersion:
        arrays = {tensor: random.normal(size=shape).astype(np.float32) for tensor, shape in shapes.items()}
        return StoredVersion(encode(arrays, ELEMENT_TYPE_FLOAT32, tmp_path / name), tmp_path / name)

    blobs = Blobs(tmp_path / "blobs")
    maker = Maker(algorithm, blobs, blobs, lambda: False)
    zero = stored("zero")
    first = maker.make(0, None, list, zero.manifest, [Source(zero.payload, ELEMENT_TYPE_FLOAT32)], [1.0])
    uploads = [stored(str(site)) for site in range(8)]
    sources = [Source(upload.payload, ELEMENT_TYPE_FLOAT32) for upload in uploads]
    base = Version(0, first.parts)
    tracemalloc.start()
    maker.make(1, base, lambda: uploads, uploads[0].manifest, sources, [0.125] * 8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # One module's factors of all sites are 4 MiB in float64, and a decomposition holds a few copies of them.
    assert peak < 24 * 2**20, peak / 2**20


def test_only_what_changes_is_fetched_again(tmp_path: Path) -> None:
    changed = {}
    for name in ("ffa-lora", "rolora", "fedsa-lora", "flora"):
        (tmp_path / name).mkdir()
        federation = Federation(tmp_path / name, make_plan(name, adapter={"ranks": ()}), SAME)
        changed[name] = []
        for _ in range(2):
            federation.round()
            before, after = ({p.name: p.digest for p in v.parts} for v in federation.versions[-2:])
            changed[name].append({part for part, digest in after.items() if before.get(part) != digest})
    assert changed == {
        "ffa-lora": [{"adapter"}, {"adapter"}],
        "rolora": [{"adapter"}, {"lora_A"}],
        "fedsa-lora": [{"adapter"}, {"adapter"}],
        "flora": [{"adapter", "base_delta/00001"}, {"adapter", "base_delta/00002"}],
    }


def test_a_ledger_is_compressed_beyond_its_rank_to_the_best_of_that_rank(tmp_path: Path) -> None:
    plan = make_plan("flora", adapter={"ranks": ()}, parameters={"ledger_rank": 14})
    federation = Federation(tmp_path, plan, SAME)
    federation.round()
    exact = federation.round()
    parts = [part.name for part in federation.versions[-1].parts]
    assert parts == ["adapter", "base_delta/00002"]
    # 14 is more than the matrices have: nothing is lost but rounding.
    assert error(federation.gained(4), exact) < 2e-6
    assert federation.received(4)["base_delta/00002/model.v_proj.lora_U"].shape == (9, 14)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 12),
    inner=st.integers(1, 15),
    rank=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_factored_svd_is_the_dense_one(m: int, n: int, inner: int, rank: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    wide, tall = random.normal(size=(m, inner)), random.normal(size=(inner, n))
    left, right = truncated_svd(wide, tall, rank)
    assert left.shape == (m, rank)
    assert right.shape == (rank, n)
    u, values, v = np.linalg.svd(wide @ tall)
    kept = min(rank, m, n)
    np.testing.assert_allclose(left @ right, (u[:, :kept] * values[:kept]) @ v[:kept], atol=1e-9 * values[0])


def test_the_norm_of_a_product_needs_no_product() -> None:
    random = np.random.default_rng(0)
    b, a = random.normal(size=(20, 3)), random.normal(size=(3, 30))
    assert product_norm(b, a) == pytest.approx(float(np.linalg.norm(b @ a)), rel=1e-12)
