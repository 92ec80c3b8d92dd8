"""A turn of a sequence as a recipe of its own: the tasks and experts there are by then."""

from __future__ import annotations

from collections.abc import Mapping

from molora.config import RunConfig, load_recipe

SHARED = "shared"  # the expert's name where one serves all tasks


def turn_recipe(
    config: RunConfig, known_ids: Mapping[str, int], turn: int = 0
) -> tuple[RunConfig, dict[str, int]]:
    """The recipe after the task number `turn` has come, and the ids of the tasks the adapter knows by then.

    Where one expert (or mixture) serves all tasks, it knows all of them from the start; else the tasks so far, each
    with an expert of its name.
    """
    assert config.continual is not None
    names = list(config.data.tasks)
    plain = config.model_dump(mode="json")
    adapter = plain["adapter"]
    if config.continual.strategy.spec.one_expert:
        several = adapter["expert_names"] is not None or config.adapter.most_experts > 1
        adapter["expert_names"] = config.adapter.experts if several else [SHARED]
        adapter["tasks"] = dict.fromkeys(names, adapter["expert_names"])
    else:
        names = names[: turn + 1]
        alone = (
            config.adapter.gate.score == "none"
        )  # the task id decides; a learned gate may use the older ones too
        adapter["num_experts"], adapter["expert_names"] = len(names), names
        adapter["tasks"] = {name: [name] if alone else names[: i + 1] for i, name in enumerate(names)}
    plain["continual"] = None
    plain["data"]["tasks"] = {name: plain["data"]["tasks"][name] for name in names}
    return load_recipe(plain), {name: known_ids[name] for name in names}
