"""Rule files: read (`files`), checked and matched against a model (`plan`), and explained (`explain`, `table`)."""

from ktransformers.rules.plan import (
    Replacement,
    Rule,
    RuleFile,
    RulesLike,
    load_rules,
    module_pattern,
    operator_problems,
    packaged_rules,
    plan,
)

__all__ = [
    "Replacement",
    "Rule",
    "RuleFile",
    "RulesLike",
    "load_rules",
    "module_pattern",
    "operator_problems",
    "packaged_rules",
    "plan",
]
