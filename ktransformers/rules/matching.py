"""Which rules hold for which modules. Each distinct condition is asked once a module, however many rules have it."""

from collections.abc import Callable, Sequence

from torch import nn

from ktransformers.models.former_names import former_names
from ktransformers.models.traits import TRAITS
from ktransformers.rules.files import Rule

Names = frozenset[str]


class Matching:
    """The modules of one model, and for which of them conditions hold. The model itself has the empty name.

    A module that many layers had a copy of has a former name for each: a rule may mean any of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.former = former_names(model)
        self._of_class: dict[type, list[str]] = {}
        for name, module in self.modules.items():
            self._of_class.setdefault(type(module), []).append(name)
        self._known: dict[tuple, Names] = {}

    def conditions(self, rule: Rule) -> dict[str, Names]:
        """Condition of the rule (name, class, trait) -> the modules for which it holds, by any of their names."""
        found = {}
        if rule.name is not None:
            found["name"] = self._named(rule, slice(None)) | self._named(rule, None)
        if rule.cls is not None:
            found["class"] = self._memoized(("class", rule.cls), lambda: self._instances(rule.cls))
        if rule.trait is not None:
            found["trait"] = self._memoized(("trait", rule.trait), lambda: self._with_trait(rule.trait))
        return found

    def names(self, rule: Rule) -> Names:
        """Names of the modules that match, by any of their names."""
        return _all(list(self.conditions(rule).values()))

    def own_names(self, rule: Rule) -> Names:
        """The same, but of a module that many layers had, only by today's name and the first layer's."""
        return self._without_name(rule, self._named(rule, None) | self._named(rule, slice(1)))

    def later_names(self, rule: Rule) -> Names:
        """The same, but only modules that had other names, by today's name and those but for the first layer's."""
        had = frozenset(self.former)
        return self._without_name(rule, had & (self._named(rule, None) | self._named(rule, slice(1, None))))

    def _without_name(self, rule: Rule, named: Names) -> Names:
        rest = [names for key, names in self.conditions(rule).items() if key != "name"]
        return _all([named, *rest])

    def _named(self, rule: Rule, which: slice | None) -> Names:
        """Modules whose name the pattern finds: today's (None), or one of the former names in `which`."""
        if rule.name is None:
            return frozenset(self.modules if which is None else ())
        search = rule.name.search
        if which is None:
            return self._memoized(("name", rule.name), lambda: (name for name in self.modules if search(name)))
        key = ("former", rule.name, which.start, which.stop)
        return self._memoized(key, lambda: (n for n, former in self.former.items() if any(map(search, former[which]))))

    def _instances(self, cls: type) -> list[str]:
        """Told for each class from one of its modules."""
        groups = self._of_class.values()
        return [name for names in groups if isinstance(self.modules[names[0]], cls) for name in names]

    def _with_trait(self, trait: str) -> list[str]:
        return [name for name, module in self.modules.items() if TRAITS[trait](module)]

    def _memoized(self, key: tuple, find: Callable) -> Names:
        if key not in self._known:
            self._known[key] = frozenset(find())
        return self._known[key]


def _all(sets: Sequence[Names]) -> Names:
    """What is in all of the sets."""
    first, *rest = sorted(sets, key=len)
    return first.intersection(*rest)
