"""From the results' tables to what a report or a summary shows: tables in, tables and sentences out.

Nothing here reads or writes files. Missing stays null: a value that a trial does not have, or that is not
finite, is never compared and never becomes 0. Values compare at equal numbers of tokens only.
"""

from raydisp.analysis.condensation import (
    LayerProfile,
    condensation_runs,
    layer_profile,
    layer_profiles,
    layer_trend,
)
from raydisp.analysis.confirmed import confirmed_doses, costs
from raydisp.analysis.fields import parallel_coordinates
from raydisp.analysis.importance import importance
from raydisp.analysis.measures import MEASURES, Measure, format_measure, format_value
from raydisp.analysis.rows import (
    Row,
    baseline_row,
    best_trial,
    compared_baseline,
    compared_tokens,
    count_statuses,
    of_arm,
    same_budget,
    scored,
    search_arms,
    search_trials,
    searched_fields,
    trial_field,
    value_of,
    without_large_texts,
)
from raydisp.analysis.search import (
    dose_of,
    dose_response,
    dose_surface,
    pareto_front,
    search_history,
)
from raydisp.analysis.sentences import describe_trial, summarise
from raydisp.analysis.training import learning_curves, time_line

__all__ = [
    "MEASURES",
    "LayerProfile",
    "Measure",
    "Row",
    "baseline_row",
    "best_trial",
    "compared_baseline",
    "compared_tokens",
    "condensation_runs",
    "confirmed_doses",
    "costs",
    "count_statuses",
    "describe_trial",
    "dose_of",
    "dose_response",
    "dose_surface",
    "format_measure",
    "format_value",
    "importance",
    "layer_profile",
    "layer_profiles",
    "layer_trend",
    "learning_curves",
    "of_arm",
    "parallel_coordinates",
    "pareto_front",
    "same_budget",
    "scored",
    "search_arms",
    "search_history",
    "search_trials",
    "searched_fields",
    "summarise",
    "time_line",
    "trial_field",
    "value_of",
    "without_large_texts",
]
