"""The winner as a Hugging Face model folder, with a card that says what was found and how.

python -m raydisp.export results/verdict --arm best --to exported
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from raydisp import paired, results, storage, verdict
from raydisp.boundary import run_command
from raydisp.config.confirm import BEST
from raydisp.confirm.frozen_plan import confirm_rows, read_plan
from raydisp.errors import OutputError, suggest
from raydisp.results.command import check_folder
from raydisp.trial import kept_models

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a mistake of the user, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m raydisp.export",
        description="Write a model of a study's confirm phase as a Hugging Face folder, with a model card.",
        epilog="Exit status: 0 done, 2 user error, 130 interrupted.",
    )
    parser.add_argument("study_dir", metavar="DIR", help="results folder of a study")
    parser.add_argument(
        "--arm",
        default=BEST,
        help="name of an arm; best (the default): the largest gain among those that help, else the baseline",
    )
    parser.add_argument(
        "--seed", type=int, help="of the run whose weights are taken; the first of the plan by default"
    )
    parser.add_argument("--to", required=True, metavar="FOLDER", help="local folder, new or empty")
    arguments = parser.parse_args(argv)
    return run_command(
        "raydisp.export",
        lambda: print(export(arguments.study_dir, arguments.to, arm=arguments.arm, seed=arguments.seed)),
    )


def export(study_dir: str, to: str, *, arm: str = BEST, seed: int | None = None) -> str:
    """Write a kept model, its tokenizer and its card into a new folder, whole or not at all.

    Args:
        arm: its name, or `best`: as `best_arm` has it.
        seed: None: the first seed of the plan, so that nobody has picked it.
    Returns:
        One sentence: what was written and where.
    Raises:
        RaydispError: there is no such run, its weights were not kept, or the folder cannot be written.
    """
    study_dir = storage.local_absolute(study_dir)
    target = Path(os.path.expanduser(to)).absolute()
    _refuse_full(target)
    check_folder(study_dir)
    trials = results.latest_attempts(results.read_table(study_dir, "trials"))
    if trials.num_rows == 0:
        raise OutputError(f"{study_dir} holds no trials; give the results folder of a study")
    plan = read_plan(trials)
    rows = confirm_rows(trials).to_pylist()
    chosen_by = "by its name"
    if arm == BEST:
        arm, chosen_by = best_arm(verdict.verdicts(trials).to_pylist(), plan.baseline)
    row = _choose(rows, list(plan.arms), plan.seeds, arm, seed, study_dir)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as problem:
        raise OutputError(f"{target} cannot be made: {problem.strerror}; choose another place") from None
    try:
        kept_models.fetch(kept_models.place_of(study_dir, row["trial"]), scratch)
        card = model_card(row, rows, verdict.sentences(trials), chosen_by)
        (scratch / "README.md").write_text(card, encoding="utf-8")
        if target.exists():
            target.rmdir()
        scratch.chmod(0o755)
        scratch.rename(target)
    except OSError as problem:
        raise OutputError(f"{target} cannot be written: {problem}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return (
        f"Wrote the model of arm {row['arm']} (chosen {chosen_by}), seed {row['seed']}, trial "
        f"{row['trial']}, to {target}"
    )


def best_arm(verdicts: Sequence[Row], baseline: str) -> tuple[str, str]:
    """The arm that the verdict calls best, and in a few words how it was chosen.

    Of those that help, that with the largest gain; where none helps, the baseline: a lower mean alone is luck
    until it is shown.
    """
    helping = [row for row in verdicts if row["verdict"] == paired.HELPS and not row["num_outstanding"]]
    if not helping:
        return baseline, "because no arm was shown to help"
    best = min(helping, key=lambda row: row["difference"])
    return best["arm"], "as the largest gain among the arms that help"


def _refuse_full(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists() or target.is_symlink():
        raise OutputError(f"--to {target} is there already and is not an empty folder; name a new one")


def _choose(
    rows: Sequence[Row], arms: Sequence[str], seeds: Sequence[int], arm: str, seed: int | None, study_dir: str
) -> Row:
    done = [row for row in rows if row["status"] == "completed" and row["test_loss"] is not None]
    if arm not in arms:
        raise OutputError(
            f"--arm {arm} is not an arm of {study_dir}; there are {BEST}, {', '.join(arms)}."
            f"{suggest(arm, arms)}"
        )
    if seed is not None and seed not in seeds:
        raise OutputError(f"--seed {seed} is not a seed of the plan; there are {', '.join(map(str, seeds))}")
    wanted = seeds if seed is None else [seed]
    ours = {row["seed"]: row for row in done if row["arm"] == arm}
    kept = [
        one
        for one in seeds
        if one in ours and kept_models.read_marker(_place(study_dir, ours[one])) is not None
    ]
    for one in wanted:
        if one in kept:
            return ours[one]
    told = f"kept are those of seeds {', '.join(map(str, kept))}" if kept else "none were kept"
    if not ours:
        told = "no run of this arm has completed"
    raise OutputError(
        f"the weights of arm {arm}{'' if seed is None else f', seed {seed}'} are not in {study_dir}: {told}; "
        "confirm.keep_models of a study file says which are (first_seed, all, none)"
    )


def _place(study_dir: str, row: Row) -> str:
    return kept_models.place_of(study_dir, row["trial"])


# --- the card --------------------------------------------------------------------------------------------


def model_card(row: Row, rows: Sequence[Row], found: Sequence[str], chosen_by: str) -> str:
    """The model card of a run, in Markdown with the hub's YAML head.

    Args:
        row: of the run whose weights these are.
        rows: of all confirm runs.
        found: the sentences of the verdict.
        chosen_by: how the arm was chosen.
    """
    config = json.loads(row["config_json"])
    plan = json.loads(row["confirm_json"])
    model, data = config["model"], config["data"]
    head: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head["tags"] = ["raydisp", "dispersion-loss"]
    if model["source"] == "hub":
        head["base_model"] = model["id"]
    if data["source"] == "hub" and not os.path.isdir(os.path.expanduser(data["path"])):
        head["datasets"] = [data["path"]]
    same = [one for one in rows if one["arm"] == row["arm"] and one["test_loss"] is not None]
    losses = [one["test_loss"] for one in same]
    origin = plan["arms"][row["arm"]].get("from_trial")
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        "",
        f"# {_text(row['study'])}: {_text(row['arm'])}, seed {row['seed']}",
        "",
        f"One of {len(same)} runs of arm `{row['arm']}` of the study `{row['study']}`, by raydisp; "
        f"the arm was chosen {chosen_by}. The test loss of this run is {row['test_loss']:.4f} nats per "
        f"token; the arm's runs have {min(losses):.4f} to {max(losses):.4f}.",
        "",
        "## Verdict",
        "",
        *[f"- {_text(sentence)}" for sentence in found],
        "",
        "## Recipe",
        "",
        f"{row['num_tokens']:,} training tokens in {row['num_steps']:,} steps, {row['precision']}, "
        f"{row['world_size']} worker{'s' if row['world_size'] != 1 else ''} on {_text(row['device'])}; "
        + (
            f"configuration of search trial {origin}."
            if origin is not None
            else "configuration as the study file has it."
        ),
        "",
        "```yaml",
        yaml.safe_dump(config, sort_keys=False).strip(),
        "```",
        "",
        "## Data",
        "",
        f"`{json.dumps(data)}`, SHA-256 `{row['data_sha256']}`. The test split was seen by no training run "
        "and no search.",
        "",
        f"Code {row['code_version']}; packages {_text(row['packages_json'])}.",
        "",
    ]
    return "\n".join(lines)


def _text(value: Any) -> str:
    """For Markdown: no markup comes out of a name or a message."""
    text = " ".join(str(value).split())
    for mark in "\\`*_<>[]#|":
        text = text.replace(mark, "\\" + mark)
    return text


if __name__ == "__main__":
    sys.exit(main())
