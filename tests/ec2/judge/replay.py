"""Plays recorded calls to an unmodified moto server, as far as moto can: ids are put for ids as they are made."""

import json
import os
import subprocess
import sys
import time
import urllib.request

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
    ("DetachVolume", "500"),  # without an instance
}
# Which members of an answer name something new.
MADE = {"CreateVolume": "VolumeId", "CreateSnapshot": "SnapshotId", "RegisterImage": "ImageId"}


def replaced(value, ids):
    if isinstance(value, dict):
        return {name: replaced(inner, ids) for name, inner in value.items()}
    if isinstance(value, list):
        return [replaced(inner, ids) for inner in value]
    return ids.get(value, value) if isinstance(value, str) else value


def prepare(ec2, ids, calls):
    """An instance and a base snapshot for the ids that no call made."""
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    instance = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1)["Instances"][0]["InstanceId"]
    volume = ec2.create_volume(AvailabilityZone="us-east-1a", Size=1)["VolumeId"]
    snapshot = ec2.create_snapshot(VolumeId=volume)["SnapshotId"]
    ec2.delete_volume(VolumeId=volume)
    for call in calls:
        for value in call["params"].values():
            kind = value.split("-")[0]
            known = {"i": instance, "snap": snapshot, "ami": image}
            if kind in known and len(value) > len(kind) + 8:
                ids.setdefault(value, known[kind])


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
        failed = [why for file in files for why in play(file, endpoint)]
    finally:
        server.terminate()
        server.wait()
    for why in failed:
        print(why, file=sys.stderr)
    sys.exit(1 if failed else 0)


def play(file, endpoint):
    urllib.request.urlopen(urllib.request.Request(f"{endpoint}/moto-api/reset", method="POST"), timeout=10).close()
    with open(file, encoding="utf-8") as lines:
        calls = [call for call in map(json.loads, lines) if call["service"] == "ec2" and call["answer"].startswith("200")]
    config = botocore.config.Config(retries={"total_max_attempts": 1})
    ec2 = boto3.client("ec2", endpoint_url=endpoint, region_name="us-east-1", config=config,
                       aws_access_key_id="x", aws_secret_access_key="x")
    ids, made, good, lacking, failed = {}, [], 0, {}, []
    # The ids that calls made are in later calls: in the order in which they were made.
    prepare(ec2, ids, calls)
    for call in calls:
        action, params = call["action"], shapes.judge("ec2", call["action"], call["params"])
        method = getattr(ec2, "".join("_" + c.lower() if c.isupper() else c for c in action)[1:].replace("e_c2", "ec2"))
        try:
            answer = method(**replaced(params, ids))
        except (botocore.exceptions.ClientError, botocore.parsers.ResponseParserError) as error:
            # Its own failures are answered as a page of HTML.
            told = error.response["Error"]["Code"] if hasattr(error, "response") else "500"
            if (action, told) in LACKS:
                lacking[f"{action} ({told})"] = lacking.get(f"{action} ({told})", 0) + 1
            else:
                failed.append(f"{file}: moto refuses {action} {params}: {error}")
            continue
        good += 1
        if action in MADE and call.get("made"):
            ids[call["made"]] = answer[MADE[action]]
            made.append(answer[MADE[action]])
    lacks = ", ".join(f"{what} {n}" for what, n in sorted(lacking.items())) or "nothing"
    print(f"played to moto: {good} of {len(calls)} calls went through; it lacks: {lacks}")
    if calls and not good:
        failed.append(f"{file}: moto took no call")
    return failed


main(sys.argv[1:])
