"""Series of measurements, their medians, their ratios, and the limits that these have to meet."""
import json
import statistics

from .machine import say


def median(values):
    return round(statistics.median(values), 4)


class Result:
    """The result of one mode. Series have a value for each run, in the order of the runs."""

    def __init__(self, name, **about):
        self.name, self.about = name, about
        self.series, self.ratios, self.facts, self.bars = {}, {}, {}, []

    def add(self, series, value, digits=3):
        self.series.setdefault(series, []).append(round(value, digits))

    def print_run(self, run, runs, names=None):
        """Prints the values of a run."""
        shown = {name: values[-1] for name, values in self.series.items() if not names or name in names}
        say(f"{self.name} {run + 1}/{runs}: " + ", ".join(f"{name} {value}" for name, value in shown.items()))

    def ratio(self, name, over, under, at_most=None, at_least=None):
        """The median of the runs' ratios: effects that are common to one run cancel out."""
        pairs = list(zip(self.series[over], self.series[under]))
        value = median([a / b for a, b in pairs])
        self.ratios[name] = value
        self.bar(name, value, at_most, at_least)
        return value

    def fact(self, name, value, at_most=None, at_least=None):
        self.facts[name] = value
        self.bar(name, value, at_most, at_least)

    def bar(self, name, value, at_most=None, at_least=None):
        if at_most is not None:
            self.bars.append({"what": name, "value": value, "bar": f"<= {at_most}", "met": value <= at_most})
        if at_least is not None:
            self.bars.append({"what": name, "value": value, "bar": f">= {at_least}", "met": value >= at_least})

    def medians(self):
        return {name: median(values) for name, values in self.series.items()}

    def to_json(self):
        return {"mode": self.name, **self.about, "medians": self.medians(), "ratios": self.ratios,
                "facts": self.facts, "bars": self.bars, "series": self.series}

    def __str__(self):
        about = ", ".join(f"{key} {value}" for key, value in self.about.items())
        lines = [f"{self.name} ({about})"]
        lines += [f"  {name:<44} {value:>10.3f}" for name, value in self.medians().items()]
        lines += [f"  {name:<44} {value:>10.3f}  ratio" for name, value in self.ratios.items()]
        lines += [f"  {name:<44} {json.dumps(value):>10}" for name, value in self.facts.items()]
        lines += [f"  {'met' if bar['met'] else 'MISSED':<6} {bar['what']}: {bar['value']} {bar['bar']}"
                  for bar in self.bars]
        return "\n".join(lines)
