"""Holds recorded calls against botocore's models: names, types, required members, and nothing unknown."""

import collections
import json
import sys

import shapes


def main(files):
    counts, wrong = collections.Counter(), []
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                call = json.loads(line)
                if call["service"] not in ("ebs", "ec2", "ssm") or not call["action"]:
                    continue
                counts[call["action"]] += 1
                try:
                    shapes.judge(call["service"], call["action"], call["params"])
                except shapes.Wrong as why:
                    wrong.append(f"{file}:{number}: {call['action']}: {why}")
    print("judged by botocore:", ", ".join(f"{action} {n}" for action, n in sorted(counts.items())) or "nothing")
    for why in wrong:
        print(why, file=sys.stderr)
    if wrong or not counts:
        sys.exit(1)


main(sys.argv[1:])
