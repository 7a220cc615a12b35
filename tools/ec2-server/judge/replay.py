"""Plays recorded calls to an unmodified moto server, as far as moto can: ids are put for ids as they are made."""

import collections
import json
import os
import subprocess
import sys

import boto3
import botocore.config
import botocore.exceptions
import botocore.parsers

import shapes

# What moto 5.2 lacks, or does otherwise than EC2: told, and no failure.
LACKS = {
    ("DescribeImageAttribute", "500"),  # of attributes that it does not know
    ("DescribeImageAttribute", "AuthFailure"),  # of the image that it has instead of ours
    ("DescribeInstanceAttribute", "InvalidParameterValue"),
    ("DescribeImages by block-device-mapping.snapshot-id", "500"),  # of images whose mappings it dropped
}
# Which members of an answer name something new.
MADE = {"CopySnapshot": "SnapshotId", "CreateVolume": "VolumeId", "CreateSnapshot": "SnapshotId",
        "RegisterImage": "ImageId", "StartSnapshot": "SnapshotId"}
# Moto reads blocks only of snapshots that were started with StartSnapshot.
READING = ("GetSnapshotBlock", "ListChangedBlocks", "ListSnapshotBlocks")


# Files that are played without OVEN_TEST_FULL: a call takes moto some hundredths of a second.
MOST = 40


def replaced(value, ids):
    if isinstance(value, dict):
        return {name: replaced(inner, ids) for name, inner in value.items()}
    if isinstance(value, list):
        return [replaced(inner, ids) for inner in value]
    return ids.get(value, value) if isinstance(value, str) else value


def prepare(ec2):
    """A snapshot and an image, for the ids that no call made."""
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    volume = ec2.create_volume(AvailabilityZone="us-east-1a", Size=1)["VolumeId"]
    snapshot = ec2.create_snapshot(VolumeId=volume)["SnapshotId"]
    ec2.delete_volume(VolumeId=volume)
    return {"snap": snapshot, "ami": image}


def start(ec2, image):
    """An instance: each id gets its own, for each has its own names of devices."""
    return ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]


def recorded(files):
    """The successful calls of each file; of several files with the same calls in the same order, those of one."""
    seen = set()
    for file in files:
        with open(file, encoding="utf-8") as lines:
            calls = [call for call in map(json.loads, lines)
                     if call["service"] in ("ebs", "ec2") and call["answer"].startswith("20")]
        # A block more or less is no other story.
        actions = tuple(dict.fromkeys(call["action"] for call in calls) if any(
            call["service"] == "ebs" for call in calls) else (call["action"] for call in calls))
        if calls and actions not in seen:
            seen.add(actions)
            yield file, calls
        if len(seen) == MOST and not os.environ.get("OVEN_TEST_FULL"):
            return


def main(files):
    server = subprocess.Popen(
        [os.path.join(os.path.dirname(sys.executable), "moto_server"), "-p", "0", "-H", "127.0.0.1"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        endpoint = None
        for line in server.stderr:
            if "http://" in line:
                endpoint = line.split()[-1]
                break
        # Somebody has to read what it logs.
        subprocess.Popen(["cat"], stdin=server.stderr, stdout=subprocess.DEVNULL)
        totals = {"good": 0, "calls": 0, "lacks": collections.Counter()}
        config = botocore.config.Config(retries={"total_max_attempts": 1})
        ec2, ebs = (boto3.client(name, endpoint_url=endpoint, region_name="us-east-1", config=config,
                                 aws_access_key_id="x", aws_secret_access_key="x") for name in ("ec2", "ebs"))
        known, played, failed = prepare(ec2), 0, []
        for file, calls in recorded(files):
            failed += play({"ec2": ec2, "ebs": ebs}, file, calls, dict(known), totals)
            played += 1
    finally:
        server.terminate()
        server.wait()
    lacks = ", ".join(f"{what} {n}" for what, n in sorted(totals["lacks"].items())) or "nothing"
    print(f"played to moto, {played} of {len(files)} files: {totals['good']} of {totals['calls']} calls went through; it lacks: {lacks}")
    for why in failed:
        print(why, file=sys.stderr)
    if not totals["good"]:
        print("moto took no call", file=sys.stderr)
    sys.exit(0 if totals["good"] and not failed else 1)


def play(clients, file, calls, known, totals):
    ec2, started = clients["ec2"], set()
    ids, attached, written, good, lacking, failed = {}, {}, set(), 0, {}, []
    for call in calls:
        for value in call["params"].values():
            kind = value.split("-")[0]
            if len(value) > len(kind) + 8 and value not in ids:
                if kind == "i":
                    ids[value] = start(ec2, known["ami"])
                elif kind in known:
                    ids[value] = known[kind]
    # The ids that calls made are in later calls: in the order in which they were made.
    for call in calls:
        action, params = call["action"], shapes.judge(call["service"], call["action"], call["params"])
        if action == "AttachVolume":
            attached[params["VolumeId"]] = params["InstanceId"]
        if action == "DetachVolume" and "InstanceId" not in params:
            # Of the one that it is attached to: moto wants to be told.
            lacking["DetachVolume (without an instance)"] = lacking.get("DetachVolume (without an instance)", 0) + 1
            params = params | {"InstanceId": attached.pop(params["VolumeId"])}
        if action in READING:
            # Of what moto knows, and what was written there.
            if {params.get("SnapshotId"), params.get("FirstSnapshotId"), params.get("SecondSnapshotId")} - started - {None}:
                lacking[f"{action} (of another snapshot)"] = lacking.get(f"{action} (of another snapshot)", 0) + 1
                continue
        if action == "PutSnapshotBlock":
            params = params | {"BlockData": bytes(params["DataLength"])}
            written.add((params["SnapshotId"], params["BlockIndex"]))
        if action == "GetSnapshotBlock" and (params["SnapshotId"], params["BlockIndex"]) not in written:
            lacking["GetSnapshotBlock (of a parent)"] = lacking.get("GetSnapshotBlock (of a parent)", 0) + 1
            continue
        method = getattr(clients[call["service"]], "".join("_" + c.lower() if c.isupper() else c for c in action)[1:].replace("e_c2", "ec2"))
        try:
            answer = method(**replaced(params, ids))
        except (botocore.exceptions.ClientError, botocore.parsers.ResponseParserError) as error:
            # Its own failures are answered as a page of HTML.
            told = error.response["Error"]["Code"] if hasattr(error, "response") else "500"
            by = [f"{action} by {wanted['Name']}" for wanted in params.get("Filters", [])]
            lack = next((f"{what} ({told})" for what in [action, *by] if (what, told) in LACKS), None)
            if lack:
                lacking[lack] = lacking.get(lack, 0) + 1
            else:
                failed.append(f"{file}: moto refuses {action} {params}: {error}")
            continue
        good += 1
        if action in MADE and call.get("made"):
            ids[call["made"]] = answer[MADE[action]]
        if action == "StartSnapshot":
            started.add(call["made"])
    # Most files of a test are alike.
    totals["good"] += good
    totals["calls"] += len(calls)
    totals["lacks"].update(lacking)
    return failed


main(sys.argv[1:])
