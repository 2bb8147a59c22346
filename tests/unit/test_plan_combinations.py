"""Each refused combination refuses and its nearest neighbour does not."""

import json
from typing import Any

import pytest

from fsllm_common.algorithms import algorithm_class, algorithm_names
from fsllm_common.errors import PlanInvalid
from fsllm_common.plan import Plan, canonical_json, plan_from_json
from fsllm_common.plan.combinations import REFUSED

CLIP = {"stage": "clip", "norm": 2.0}
NOISE = {"stage": "noise", "multiplier": 0.5}
PAIRS = {"format": "preference", "packing": False}
UNIFORM = {"weighting": "uniform"}
NOOP = {"name": "noop"}
SYNTHETIC = {"name": "synthetic"}
SCAFFOLD = {"name": "scaffold", "parameters": {"sites": 4}}


REASONS = [*REFUSED, *{r.why: r for name in algorithm_names() for r in algorithm_class(name).refuses}.values()]


def load(changes: dict[str, Any]) -> Plan:
    return plan_from_json(json.dumps({"name": "trial", "model": {"name": "embedded"}, **changes}).encode())


PLAIN = {"optimizer": "sgd", "max_grad_norm": 0}

# (what is refused, words of the reason, the nearest plan that is not)
CASES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"train": {"steps": 5, "epochs": 1}}, "set steps: null", {"train": {"steps": None, "epochs": 1}}),
    ({"train": {"steps": None}}, "one of them is needed", {"train": {"steps": 1}}),
    (
        {"train": {"batch_size": 16, "micro_batch_size": 5}},
        "must divide",
        {"train": {"batch_size": 15, "micro_batch_size": 5}},
    ),
    (
        {"rounds": 3, "train": {"warmup_rounds": 3}},
        "warm up for fewer rounds",
        {"rounds": 3, "train": {"warmup_rounds": 2}},
    ),
    (
        {
            "adapter": {"kind": "prefix"},
            "data": {"packing": False},
            "train": {"gradient_checkpointing": True},
        },
        "drops the cache that a prefix is",
        {
            "adapter": {"kind": "prompt"},
            "data": {"packing": False},
            "train": {"gradient_checkpointing": True},
        },
    ),
    (
        {"deepspeed": {"zero_stage": 2, "offload_parameters": True}},
        "stage 3 only",
        {"deepspeed": {"zero_stage": 3, "offload_parameters": True}},
    ),
    (
        {"model": {"name": "embedded", "quantization": "nf4"}, "deepspeed": {"zero_stage": 3}},
        "which quantised ones do not survive",
        {"model": {"name": "embedded", "quantization": "nf4"}, "deepspeed": {"zero_stage": 2}},
    ),
    ({"algorithm": NOOP}, "model.name: synthetic", {"algorithm": NOOP, "model": SYNTHETIC}),
    ({"model": SYNTHETIC}, "algorithm.name: noop", {"model": SYNTHETIC, "algorithm": NOOP}),
    (
        {"model": SYNTHETIC, "algorithm": NOOP, "evaluate": {"metrics": ["exact_match"]}},
        "without a model there are no answers",
        {"model": SYNTHETIC, "algorithm": NOOP, "evaluate": {"metrics": ["loss"]}},
    ),
    (
        {"model": SYNTHETIC, "algorithm": {**NOOP, "synthetic": {"tensors": 200_001}}},
        "at most 200000 tensors",
        {"model": SYNTHETIC, "algorithm": {**NOOP, "synthetic": {"tensors": 200_000}}},
    ),
    ({"cohort": {"sites": [], "quorum": 1}}, "nobody", {"cohort": {"sites": ["a"], "quorum": 1}}),
    ({"cohort": {"sites": ["a", "B"]}}, "a site's name", {"cohort": {"sites": ["a", "b"]}}),
    ({"cohort": {"sites": ["a", "b", "a"]}}, "named twice", {"cohort": {"sites": ["a", "b", "c"]}}),
    (
        {"cohort": {"sites": ["a", "b"], "quorum": 3}},
        "could never be reached",
        {"cohort": {"sites": ["a", "b"], "quorum": 2}},
    ),
    ({"cohort": {"size": 2, "quorum": 3}}, "fewer updates than its quorum", {"cohort": {"size": 3, "quorum": 3}}),
    (
        {"cohort": {"sites": ["a", "b"], "size": 3}},
        "the size is larger than the number of sites",
        {"cohort": {"sites": ["a", "b"], "size": 2}},
    ),
    ({"cohort": {"over_selection": 1.5}}, "give cohort.size", {"cohort": {"over_selection": 1.5, "size": 2}}),
    (
        {"adapter": {"kind": "prompt", "targets": ["q_proj"]}, "data": {"packing": False}},
        "adapts no modules",
        {"adapter": {"kind": "prompt"}, "data": {"packing": False}},
    ),
    ({"adapter": {"targets": []}}, "adapts nothing", {"adapter": {"targets": ["q_proj"]}}),
    (
        {"adapter": {"kind": "prefix"}},
        "virtual tokens stand before",
        {"adapter": {"kind": "prefix"}, "data": {"packing": False}},
    ),
    ({"data": {"template": "alpacca"}}, "unknown template", {"data": {"template": "chatml"}}),
    (
        {"data": {"fields": {"prompt": "p", "output": "o"}}},
        "one format",
        {"data": {"fields": {"prompt": "p", "completion": "c"}}},
    ),
    (
        {"data": {"format": "chat", "fields": {"text": "t"}}},
        "one format",
        {"data": {"format": "text", "fields": {"text": "t"}}},
    ),
    (
        {"data": {"format": "text"}, "evaluate": {"metrics": ["exact_match"]}},
        "plain text has no answers",
        {"data": {"format": "completion"}, "evaluate": {"metrics": ["exact_match"]}},
    ),
    ({"pipeline": [CLIP, CLIP]}, "clip may stand there once", {"pipeline": [CLIP]}),
    (
        {"pipeline": [CLIP, NOISE, NOISE], "algorithm": UNIFORM},
        "noise may stand there once",
        {"pipeline": [CLIP, NOISE], "algorithm": UNIFORM},
    ),
    ({"pipeline": [NOISE], "algorithm": UNIFORM}, "Put a clip before it", {"pipeline": []}),
    (
        {"pipeline": [NOISE, CLIP], "algorithm": UNIFORM},
        "clip must come before noise",
        {"pipeline": [CLIP, NOISE], "algorithm": UNIFORM},
    ),
    (
        {"pipeline": [CLIP, NOISE], "algorithm": {"weighting": "capped"}},
        "say algorithm.weighting: uniform",
        {"pipeline": [CLIP], "algorithm": {"weighting": "capped"}},
    ),
    (
        {"pipeline": [CLIP], "wire": {"max_update_norm": 1.9}},
        "raise max_update_norm",
        {"pipeline": [CLIP], "wire": {"max_update_norm": 2.0}},
    ),
    (
        {"algorithm": {"name": "dpo"}},
        "say data.format: preference",
        {"algorithm": {"name": "dpo"}, "data": PAIRS, "evaluate": {"metrics": ["loss", "reward_accuracy"]}},
    ),
    (
        {"data": PAIRS, "evaluate": {"metrics": ["loss"]}},
        "say algorithm.name: dpo",
        {"data": PAIRS, "evaluate": {"metrics": ["loss"]}, "algorithm": {"name": "dpo"}},
    ),
    (
        {"algorithm": {"name": "dpo"}, "data": {"format": "preference"}, "evaluate": {"metrics": ["loss"]}},
        "a preference is two sequences",
        {"algorithm": {"name": "dpo"}, "data": PAIRS, "evaluate": {"metrics": ["loss"]}},
    ),
    (
        {"algorithm": {"name": "dpo"}, "data": PAIRS, "evaluate": {"metrics": ["loss", "perplexity"]}},
        "say metrics: [loss, reward_accuracy]",
        {"algorithm": {"name": "dpo"}, "data": PAIRS, "evaluate": {"metrics": ["loss", "reward_accuracy"]}},
    ),
    (
        {"evaluate": {"metrics": ["reward_accuracy"]}},
        "compares a chosen answer with a rejected one",
        {"evaluate": {"metrics": ["loss"]}},
    ),
    (
        {"algorithm": {"name": "krum"}, "cohort": {"quorum": 4}},
        "could not withstand bad ones",
        {"algorithm": {"name": "krum"}, "cohort": {"quorum": 5}},
    ),
    (
        {"algorithm": {"name": "median"}, "cohort": {"quorum": 3}},
        "freeze_a: true",
        {"algorithm": {"name": "median", "parameters": {"freeze_a": True}}, "cohort": {"quorum": 3}},
    ),
    (
        {"algorithm": {"name": "krum", "parameters": {"freeze_a": True, "byzantine": 0}}, "cohort": {"quorum": 3}}
        | {"adapter": {"kind": "ia3"}},
        "no A to freeze",
        {"algorithm": {"name": "krum", "parameters": {"freeze_a": True, "byzantine": 0}}, "cohort": {"quorum": 3}},
    ),
    (
        {"algorithm": {"name": "fednova"}, "train": {"optimizer": "sgd"}},
        "right for plain gradient steps only",
        {"algorithm": {"name": "fednova"}, "train": PLAIN},
    ),
    (
        {"algorithm": {"name": "ditto"}, "train": {"optimizer_state": "keep"}},
        "each turn with a fresh optimizer",
        {"algorithm": {"name": "fedprox"}, "train": {"optimizer_state": "keep"}},
    ),
    (
        {"algorithm": {"name": "scaffold"}},
        "the share of all sites that took part",
        {"algorithm": {"name": "scaffold"}, "cohort": {"sites": ["a", "b"]}},
    ),
    (
        {"algorithm": {"name": "scaffold", "parameters": {"sites": 5}}, "pipeline": [CLIP]},
        "control variates beside the delta",
        {"algorithm": {"name": "scaffold", "parameters": {"sites": 5}}},
    ),
    (
        {
            "algorithm": {"name": "fednova", "parameters": {"mu": 0.1}},
            "train": {**PLAIN, "schedule": "cosine"},
        },
        "from one learning rate",
        {"algorithm": {"name": "fednova"}, "train": {**PLAIN, "schedule": "cosine"}},
    ),
    (
        {"algorithm": {"name": "fedper", "parameters": {"personal": "magnitude"}}},
        "no such tensors to keep",
        {"algorithm": {"name": "fedper", "parameters": {"personal": "magnitude"}}, "adapter": {"kind": "dora"}},
    ),
    (
        {"algorithm": {"name": "fdlora"}, "adapter": {"kind": "dora"}},
        "factors of other kinds of adapter",
        {"algorithm": {"name": "fdlora"}},
    ),
    (
        {"algorithm": {"name": "fedalt", "server_learning_rate": 0.5}},
        "the mean of the sites' LoRAs themselves",
        {"algorithm": {"name": "fedalt"}},
    ),
    (
        {"algorithm": {"name": "fedalt"}, "cohort": {"size": 3, "over_selection": 1.5}},
        "came too late to be in it",
        {"algorithm": {"name": "fedalt"}, "cohort": {"size": 3}},
    ),
    ({"algorithm": {"name": "fedalt"}, "pipeline": [CLIP]}, "hold it clipped", {"algorithm": {"name": "fedalt"}}),
    (
        {"algorithm": {"name": "fedalt", **UNIFORM}, "pipeline": [CLIP, NOISE]},
        "hold it clipped and noised",
        {"algorithm": {"name": "fedalt", **UNIFORM}},
    ),
    (
        {"cohort": {"buffer": {"size": 3}, "size": 3}},
        "ask every site that is there",
        {"cohort": {"buffer": {"size": 3}}},
    ),
    (
        {"cohort": {"buffer": {"size": 1}, "quorum": 2}},
        "fewer updates than the quorum",
        {"cohort": {"buffer": {"size": 1}, "quorum": 1}},
    ),
    (
        {"cohort": {"buffer": {"size": 3}, "sites": ["a", "b"]}},
        "each site counts once a version",
        {"cohort": {"buffer": {"size": 2}, "sites": ["a", "b"]}},
    ),
    (
        {"cohort": {"buffer": {"size": 2}}, "algorithm": {"name": "rolora"}},
        "rounds build on each other",
        {"cohort": {"buffer": {"size": 2}}, "algorithm": {"name": "ffa-lora"}},
    ),
    (
        {"algorithm": {"name": "median"}, "adapter": {"kind": "ia3"}, "cohort": {"buffer": {"size": 3}}},
        "would count like a fresh one",
        {"algorithm": {"name": "norm-bound"}, "adapter": {"kind": "ia3"}, "cohort": {"buffer": {"size": 2}}},
    ),
    (
        {"algorithm": {"name": "flora"}, "adapter": {"kind": "dora"}},
        "factors of other kinds of adapter",
        {"algorithm": {"name": "flora"}, "adapter": {"kind": "rslora"}},
    ),
    (
        {"algorithm": {"name": "fedavg"}, "adapter": {"rank": 8, "ranks": [4]}},
        "puts tensors of one shape together",
        {"algorithm": {"name": "flexlora"}, "adapter": {"rank": 8, "ranks": [4]}},
    ),
    (
        {"algorithm": {"name": "ffa-lora"}, "adapter": {"rank": 8, "ranks": [4], "kind": "dora"}},
        "can be cut to a smaller rank",
        {"algorithm": {"name": "ffa-lora"}, "adapter": {"rank": 8, "ranks": [4], "kind": "rslora"}},
    ),
    (
        {"algorithm": {"name": "ffa-lora"}, "adapter": {"rank": 8, "ranks": [4]}, "cohort": {"buffer": {"size": 2}}},
        "put together anew in each round",
        {"algorithm": {"name": "ffa-lora"}, "adapter": {"rank": 8}, "cohort": {"buffer": {"size": 2}}},
    ),
    (
        {"algorithm": {"name": "fedit", "server_learning_rate": 0.5}, "adapter": {"rank": 8, "ranks": [4]}},
        "takes no step from the last version",
        {"algorithm": {"name": "fedit", "server_learning_rate": 0.5}},
    ),
    (
        {"algorithm": {"name": "flexlora"}, "adapter": {"rank": 8, "ranks": [8, 4]}},
        "those smaller than rank",
        {"algorithm": {"name": "flexlora"}, "adapter": {"rank": 8, "ranks": [2, 4]}},
    ),
    (
        {"algorithm": {"name": "pfedme"}, "train": {**PLAIN, "learning_rate": 0.2}},
        "drives them apart",
        {"algorithm": {"name": "pfedme"}, "train": {**PLAIN, "learning_rate": 0.1}},
    ),
    (
        {"algorithm": {"name": "geometric-median", "weighting": "tokens"}, "cohort": {"quorum": 3}},
        "decides itself what an update counts for",
        {"algorithm": {"name": "geometric-median", "weighting": "uniform"}, "cohort": {"quorum": 3}},
    ),
    (
        {"algorithm": {"name": "geometric-median", "weighting": "examples"}, "cohort": {"quorum": 3}},
        "decides itself what an update counts for",
        {"algorithm": {"name": "geometric-median"}, "pipeline": [CLIP, NOISE], "cohort": {"quorum": 3}},
    ),
    (
        {"pipeline": [CLIP, NOISE], "algorithm": UNIFORM, "train": {"steps": None, "epochs": 1}},
        "tell how many rows a site has",
        {"pipeline": [CLIP, NOISE], "algorithm": UNIFORM, "train": {"steps": 3}},
    ),
    (
        {"algorithm": {"name": "median"}, "adapter": {"kind": "vera"}, "cohort": {"quorum": 3}},
        "two vectors that multiply each other",
        {"algorithm": {"name": "geometric-median"}, "adapter": {"kind": "vera"}, "cohort": {"quorum": 3}},
    ),
    (
        {"algorithm": SCAFFOLD, "cohort": {"buffer": {"size": 2}}},
        "only while each change counts in full",
        {"algorithm": SCAFFOLD, "cohort": {"buffer": {"size": 2, "weight": "constant"}}},
    ),
    (
        {"algorithm": {"name": "geometric-median"}, "cohort": {"buffer": {"size": 2}}},
        "could not withstand bad ones",
        {"algorithm": {"name": "geometric-median"}, "cohort": {"quorum": 3, "buffer": {"size": 3}}},
    ),
    ({"rounds": 100_000}, "at most 99999", {"rounds": 99_999}),
    (
        {"rounds": 10_001, "algorithm": {"name": "ferret"}},
        "which may have 10000",
        {"rounds": 10_000, "algorithm": {"name": "ferret"}},
    ),
    (
        {"rounds": 10_001, "algorithm": {"name": "flora"}},
        "which may have 10000",
        {"rounds": 10_001, "algorithm": {"name": "flora", "parameters": {"ledger_rank": 64}}},
    ),
    ({"evaluate": {"metrics": []}}, "and each once", {"evaluate": {"metrics": [], "every": 0}}),
    ({"evaluate": {"metrics": ["loss", "loss"]}}, "and each once", {"evaluate": {"metrics": ["loss", "perplexity"]}}),
    (
        {"algorithm": UNIFORM, "pipeline": [CLIP, {"stage": "noise", "multiplier": 1e-200}]},
        "less hides nothing",
        {"algorithm": UNIFORM, "pipeline": [CLIP, {"stage": "noise", "multiplier": 1e-4}]},
    ),
    (
        {"algorithm": UNIFORM, "pipeline": [CLIP, {"stage": "noise", "multiplier": 1e300}]},
        "more leaves nothing",
        {"algorithm": UNIFORM, "pipeline": [CLIP, {"stage": "noise", "multiplier": 1e4}]},
    ),
    (
        {"algorithm": {"name": "scaffold", "parameters": {"sites": 2}}, "cohort": {"sites": list("abcde")}},
        "share of all sites that took part",
        {"algorithm": {"name": "scaffold", "parameters": {"sites": 5}}, "cohort": {"sites": list("abcde")}},
    ),
    (
        {"algorithm": {"name": "scaffold", "parameters": {"sites": 3}}, "cohort": {"size": 4}},
        "share of all sites that took part",
        {"algorithm": {"name": "scaffold", "parameters": {"sites": 4}}, "cohort": {"size": 4}},
    ),
    (
        {
            "algorithm": {"name": "scaffold", "parameters": {"sites": 2, "estimate": "steps"}},
            "train": {**PLAIN, "schedule": "cosine", "final_fraction": 0},
        },
        "which would be 0 in the last round",
        {
            "algorithm": {"name": "scaffold", "parameters": {"sites": 2, "estimate": "steps"}},
            "train": {**PLAIN, "schedule": "cosine", "final_fraction": 0.01},
        },
    ),
    *(
        (
            {"algorithm": {"name": name, "parameters": {key: 20}}, "train": {**PLAIN, "learning_rate": 0.1}},
            "leads further away each time",
            {"algorithm": {"name": name, "parameters": {key: 19}}, "train": {**PLAIN, "learning_rate": 0.1}},
        )
        for name, key in (("fedprox", "mu"), ("fednova", "mu"), ("ditto", "pull"))
    ),
    (
        {"algorithm": {"name": "flora", "server_learning_rate": 0.5}},
        "makes each module anew",
        {"algorithm": {"name": "fedit", "server_learning_rate": 0.5}},
    ),
    (
        {"algorithm": {"name": "flexlora"}, "train": {"optimizer_state": "keep"}},
        "drawn anew or rotated",
        {"algorithm": {"name": "fedex-lora"}, "train": {"optimizer_state": "keep"}},
    ),
    (
        {"algorithm": {"name": "fedex"}, "pipeline": [CLIP]},
        "beside the delta: a clip or a largest norm",
        {"algorithm": {"name": "fedex"}},
    ),
    (
        {"algorithm": {"name": "fedex"}, "data": {"validation_fraction": 0}},
        "compares losses on each site's validation rows",
        {"algorithm": {"name": "fedex"}, "data": {"validation_fraction": 0.01}},
    ),
    (
        {"algorithm": {"name": "fedex", "parameters": {"learning_rates": "1"}}},
        "chooses between 2 to 256 arms",
        {"algorithm": {"name": "fedex", "parameters": {"learning_rates": "1", "steps": "0.5,1"}}},
    ),
    (
        {"algorithm": {"name": "fedask"}, "rounds": 3},
        "for its two exchanges",
        {"algorithm": {"name": "fedask"}, "rounds": 4},
    ),
    (
        {"algorithm": {"name": "fedkseed"}, "train": {**PLAIN, "schedule": "linear"}},
        "one learning rate times a sum",
        {"algorithm": {"name": "fedkseed"}, "train": PLAIN},
    ),
]


@pytest.mark.parametrize(("refused", "words", "allowed"), CASES)
def test_the_combination_is_refused_with_its_keys_and_reason_and_its_neighbour_is_not(
    refused: dict[str, Any], words: str, allowed: dict[str, Any]
) -> None:
    with pytest.raises(PlanInvalid) as caught:
        load(refused)
    assert words in caught.value.message
    (reason,) = [c for c in REASONS if words in c.why]
    assert caught.value.message == f"{reason.keys}: {reason.why}"
    load(allowed)


@pytest.mark.parametrize("name", ["krum", "norm-bound", "fltrust", "scaffold", "fedalt", "hetlora"])
def test_the_recorded_plan_says_how_updates_are_weighted_where_only_one_way_is_right(name: str) -> None:
    plan = load({"algorithm": {"name": name}, "cohort": {"quorum": 9, "sites": list("abcdefghi")}})
    assert plan.algorithm.weighting == "uniform"
    assert plan_from_json(canonical_json(plan)) == plan
    with pytest.raises(PlanInvalid, match="decides itself what an update counts for"):
        load({"algorithm": {"name": name, "weighting": "capped"}, "cohort": {"quorum": 9, "sites": list("abcdefghi")}})
    assert load({"algorithm": {"name": "fedavg"}}).algorithm.weighting == "examples"


def test_fedex_refuses_a_largest_norm_as_it_does_a_clip() -> None:
    with pytest.raises(PlanInvalid, match="a clip or a largest norm"):
        load({"algorithm": {"name": "fedex"}, "wire": {"max_update_norm": 9}})


def test_pruning_trains_in_a_turn_of_its_own() -> None:
    train = {"optimizer_state": "keep"}
    with pytest.raises(PlanInvalid, match="each turn with a fresh optimizer"):
        load({"algorithm": {"name": "hetlora", "parameters": {"prune_penalty": 0.1}}, "train": train})
    load({"algorithm": {"name": "hetlora"}, "train": train})


def test_every_row_of_the_table_has_a_case() -> None:
    assert [c.why for c in REASONS if not any(words in c.why for _, words, _ in CASES)] == []


def test_an_unknown_algorithm_names_the_nearest_and_the_known() -> None:
    with pytest.raises(PlanInvalid, match="unknown algorithm 'fedpro'; did you mean 'fedprox'"):
        load({"algorithm": {"name": "fedpro"}})
    with pytest.raises(PlanInvalid, match=r"installed: .*fedavg.*noop"):
        load({"algorithm": {"name": "zzz"}})


RELAID = ("flora", "rac-lora", "flexlora", "hlora", "hetlora", "fedex-lora", "lora-fair", "fedask")


@pytest.mark.parametrize("name", RELAID)
def test_a_rate_that_would_not_be_looked_at_is_refused(name: str) -> None:
    with pytest.raises(PlanInvalid, match="makes each module anew"):
        load({"algorithm": {"name": name, "server_learning_rate": 0.5}})
    plan = load({"algorithm": {"name": name}})
    assert plan_from_json(canonical_json(plan)) == plan


@pytest.mark.parametrize("name", ["flora", "rac-lora", "hlora", "fedask"])
def test_an_optimizer_of_other_factors_is_not_kept(name: str) -> None:
    with pytest.raises(PlanInvalid, match="say optimizer_state: reset"):
        load({"algorithm": {"name": name}, "train": {"optimizer_state": "keep"}})
