"""The newest figure of every bar beside its bar: `make bars`."""

import json

from .results import RESULTS, met


def main() -> None:
    newest: dict[tuple, dict] = {}
    for path in sorted(RESULTS.glob("*.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            newest[(line["issue"], line["figure"], path.stem)] = line
    for (issue, figure, where), line in sorted(newest.items()):
        verdict = "met" if met(line["value"], line["bar"]) else "MISSED"
        value = f"{line['value']:.4g} {line['unit']}"
        print(f"{verdict:7}{issue:15}{value:>16}  {line['bar']:>10}  {figure}  [{where}, {line['date']}]")


if __name__ == "__main__":
    main()
