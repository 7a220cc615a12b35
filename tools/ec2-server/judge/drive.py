"""Drives each action of the server through boto3: the answers have to be what botocore's models say, and what EC2 means.

usage: drive.py SERVER DIR    writes DIR/calls.json
"""

import base64
import hashlib
import os
import subprocess
import sys
import time

import boto3
import botocore.config
import botocore.exceptions

import shapes

PROGRAM, DIR = sys.argv[1:]
RAW = os.path.join(DIR, "base.raw")
with open(RAW, "wb") as raw:
    raw.write(b"x" * 4096)
    raw.truncate(1 << 20)

server = subprocess.Popen(
    [PROGRAM, "--region-dir", os.path.join(DIR, "region"), "--import", f"debian={RAW}",
     "--parameter", "/aws/service/debian=ami-0123456789abcdef0", "--record", os.path.join(DIR, "calls.json")],
    stdout=subprocess.PIPE, text=True)
image = server.stdout.readline().split()[0]
endpoint = server.stdout.readline().strip()

for name in list(os.environ):
    if name.startswith("AWS_") or name.lower().endswith("_proxy"):
        del os.environ[name]
os.environ["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = endpoint
config = botocore.config.Config(retries={"total_max_attempts": 1}, parameter_validation=True)
# No keys: botocore has to get them of the server's IMDS.
session = boto3.Session(region_name="us-east-1")
ec2 = session.client("ec2", endpoint_url=endpoint, config=config)
ebs = session.client("ebs", endpoint_url=endpoint, config=config)
done = set()


def after(parsed, model, http_response, **_):
    done.add(model.name)
    if http_response.status_code == 200:
        shapes.judge_answer(model.name, http_response.content)


def after_json(parsed, model, http_response, **_):
    done.add(model.name)
    if http_response.status_code < 300:
        body = b"" if model.has_streaming_output else http_response.content
        shapes.judge_json("ebs", model.name, http_response.status_code, http_response.headers, body)


ec2.meta.events.register("after-call.ec2", after)
ebs.meta.events.register("after-call.ebs", after_json)


def code(call, **params):
    try:
        call(**params)
    except botocore.exceptions.ClientError as error:
        assert error.response["Error"]["Message"], error
        return error.response["Error"]["Code"]
    raise AssertionError(f"{params} went through")


def tags(kind, **pairs):
    return [{"ResourceType": kind, "Tags": [{"Key": k, "Value": v} for k, v in pairs.items()]}]


def pairs(listed):
    return {tag["Key"]: tag["Value"] for tag in listed}


def story():
    identity = session.client("sts", endpoint_url=endpoint, config=config).get_caller_identity()
    assert identity["Account"] == "123456789012" and identity["Arn"].startswith("arn:aws:sts::"), identity
    ssm = session.client("ssm", endpoint_url=endpoint, config=config)
    assert ssm.get_parameter(Name="/aws/service/debian")["Parameter"]["Value"] == "ami-0123456789abcdef0"
    try:
        ssm.get_parameter(Name="/none")
    except ssm.exceptions.ParameterNotFound:
        pass
    else:
        raise AssertionError("a parameter that is not there")

    assert [r["RegionName"] for r in ec2.describe_regions()["Regions"]] == ["us-east-1"]
    zones = ec2.describe_availability_zones()["AvailabilityZones"]
    assert [z["ZoneName"] for z in zones] == ["us-east-1a", "us-east-1b"], zones
    builder = ec2.describe_instances()["Reservations"][0]["Instances"][0]
    assert builder["State"]["Name"] == "running" and builder["BlockDeviceMappings"][0]["DeviceName"] == "/dev/xvda"

    base = ec2.describe_images(Owners=["self"], Filters=[{"Name": "name", "Values": ["deb*"]}])["Images"][0]
    assert base["ImageId"] == image and base["State"] == "available" and base["EnaSupport"] is True, base
    mapping = base["BlockDeviceMappings"][0]["Ebs"]
    assert mapping["VolumeSize"] == 1 and mapping["DeleteOnTermination"] is True, base
    snapshot = mapping["SnapshotId"]
    for attribute in ("blockDeviceMapping", "bootMode", "description", "launchPermission", "productCodes",
                      "sriovNetSupport", "tpmSupport", "uefiData", "imdsSupport"):
        ec2.describe_image_attribute(ImageId=image, Attribute=attribute)

    wanted = dict(AvailabilityZone="us-east-1a", SnapshotId=snapshot, VolumeType="gp3", Iops=3000, Throughput=125,
                  Size=2, Encrypted=True, ClientToken="token", TagSpecifications=tags("volume", run="r", k=""))
    assert code(ec2.create_volume, DryRun=True, **wanted) == "DryRunOperation"
    volume = ec2.create_volume(**wanted)
    assert volume["State"] == "creating" and volume["Size"] == 2 and volume["CreateTime"].year > 2000, volume
    assert pairs(volume["Tags"]) == {"run": "r", "k": ""} and volume["Throughput"] == 125, volume
    assert ec2.create_volume(**wanted)["VolumeId"] == volume["VolumeId"]
    volume = volume["VolumeId"]
    ec2.get_waiter("volume_available").wait(VolumeIds=[volume])
    here = dict(VolumeId=volume, InstanceId=builder["InstanceId"])
    assert ec2.attach_volume(Device="/dev/sdf", **here)["State"] == "attaching"
    ec2.get_waiter("volume_in_use").wait(VolumeIds=[volume])
    attachment = ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["Attachments"][0]
    assert attachment["State"] == "attached" and attachment["Device"] == "/dev/sdf", attachment
    ec2.modify_instance_attribute(
        InstanceId=builder["InstanceId"],
        BlockDeviceMappings=[{"DeviceName": "/dev/sdf", "Ebs": {"DeleteOnTermination": True, "VolumeId": volume}}])
    for attribute in ("blockDeviceMapping", "instanceType", "rootDeviceName", "enaSupport", "sriovNetSupport"):
        told = ec2.describe_instance_attribute(InstanceId=builder["InstanceId"], Attribute=attribute)
    assert ec2.detach_volume(**here)["State"] == "detaching"
    ec2.get_waiter("volume_available").wait(VolumeIds=[volume])
    taken = ec2.create_snapshot(VolumeId=volume, Description="a <b>", TagSpecifications=tags("snapshot", run="r"))
    assert taken["Description"] == "a <b>" and taken["Encrypted"] is True, taken
    ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[taken["SnapshotId"]])
    found = ec2.describe_snapshots(OwnerIds=["self"], Filters=[
        {"Name": "tag:run", "Values": ["r"]}, {"Name": "volume-id", "Values": [volume]}])["Snapshots"]
    assert [s["SnapshotId"] for s in found] == [taken["SnapshotId"]] and found[0]["Progress"] == "100%", found
    registering = dict(
        Name="web", Description="d", Architecture="x86_64", VirtualizationType="hvm", RootDeviceName="/dev/xvda",
        EnaSupport=True, SriovNetSupport="simple", BootMode="uefi", TpmSupport="v2.0", ImdsSupport="v2.0",
        BlockDeviceMappings=[
            {"DeviceName": "/dev/xvda", "Ebs": {"SnapshotId": taken["SnapshotId"], "VolumeSize": 3, "VolumeType": "gp3",
                                                "DeleteOnTermination": True}},
            {"DeviceName": "/dev/sdb", "VirtualName": "ephemeral0"}, {"DeviceName": "/dev/sdc", "NoDevice": ""}],
        TagSpecifications=tags("image", run="r"))
    web = ec2.register_image(**registering)["ImageId"]
    assert code(ec2.register_image, **registering) == "InvalidAMIName.Duplicate"
    ec2.get_waiter("image_available").wait(ImageIds=[web])
    told = ec2.describe_images(ImageIds=[web])["Images"][0]
    for name in ("Name", "Description", "Architecture", "EnaSupport", "BootMode", "TpmSupport", "ImdsSupport"):
        assert told[name] == registering[name], told
    assert [m["DeviceName"] for m in told["BlockDeviceMappings"]] == ["/dev/xvda", "/dev/sdb"], told
    assert told["UsageOperation"] == "RunInstances" and told["PlatformDetails"] == "Linux/UNIX", told
    assert pairs(told["Tags"]) == {"run": "r"}, told
    ec2.modify_image_attribute(ImageId=web, Description={"Value": "new"})
    ec2.modify_image_attribute(ImageId=web, LaunchPermission={"Add": [{"Group": "all"}]})
    assert ec2.describe_images(ExecutableUsers=["all"])["Images"][0]["Description"] == "new"
    ec2.create_tags(Resources=[web, volume], Tags=[{"Key": "x", "Value": "y"}])
    ec2.delete_tags(Resources=[web], Tags=[{"Key": "x"}])
    assert pairs(ec2.describe_volumes(VolumeIds=[volume])["Volumes"][0]["Tags"])["x"] == "y"
    pages = ec2.get_paginator("describe_volumes").paginate(PaginationConfig={"PageSize": 5})
    assert [v["VolumeId"] for page in pages for v in page["Volumes"]] == [volume]
    assert code(ec2.delete_snapshot, SnapshotId=taken["SnapshotId"]) == "InvalidSnapshot.InUse"
    ec2.delete_volume(VolumeId=volume)
    assert code(ec2.describe_volumes, VolumeIds=[volume]) == "InvalidVolume.NotFound"
    gone = ec2.deregister_image(ImageId=web, DeleteAssociatedSnapshots=True)
    assert gone["DeleteSnapshotResults"][0]["ReturnCode"] == "success", gone
    volume = ec2.create_volume(AvailabilityZone="us-east-1a", SnapshotId=snapshot)["VolumeId"]
    taken = ec2.create_snapshot(VolumeId=volume)["SnapshotId"]
    ec2.delete_snapshot(SnapshotId=taken)
    ec2.delete_volume(VolumeId=volume)
    ec2.terminate_instances(InstanceIds=[builder["InstanceId"]])


def digest(data):
    return hashlib.sha256(data).digest()


def told(checksum):
    return base64.b64encode(checksum).decode()


def put(snapshot, index, data):
    answer = ebs.put_snapshot_block(
        SnapshotId=snapshot, BlockIndex=index, BlockData=data, DataLength=len(data), Progress=50,
        Checksum=told(digest(data)), ChecksumAlgorithm="SHA256")
    assert answer["Checksum"] == told(digest(data)) and answer["ChecksumAlgorithm"] == "SHA256", answer


def complete(snapshot, blocks):
    linear = digest(b"".join(digest(data) for data in blocks))
    answer = ebs.complete_snapshot(
        SnapshotId=snapshot, ChangedBlocksCount=len(blocks), Checksum=told(linear), ChecksumAlgorithm="SHA256",
        ChecksumAggregationMethod="LINEAR")
    assert answer["Status"] == "pending", answer
    # The waiter of botocore looks every 15 s.
    while ec2.describe_snapshots(SnapshotIds=[snapshot])["Snapshots"][0]["State"] == "pending":
        time.sleep(0.02)


def blocks():
    ones, twos = b"1" * 524288, b"2" * 524288
    asked = dict(VolumeSize=1, Description="d", Timeout=10, ClientToken="token", Tags=[{"Key": "run", "Value": "r"}])
    started = ebs.start_snapshot(**asked)
    parent = started["SnapshotId"]
    assert started["Status"] == "pending" and started["BlockSize"] == 524288, started
    assert started["StartTime"].year > 2000 and started["Tags"] == asked["Tags"], started
    assert ebs.start_snapshot(**asked)["SnapshotId"] == parent
    assert code(ebs.start_snapshot, **asked | {"VolumeSize": 2}) == "ConflictException"
    assert code(ebs.start_snapshot, VolumeSize=1, Encrypted=True, ParentSnapshotId=parent) == "ValidationException"
    put(parent, 0, ones)
    put(parent, 7, twos)
    assert code(ebs.list_snapshot_blocks, SnapshotId=parent) == "ValidationException"
    complete(parent, [ones, twos])
    child = ebs.start_snapshot(VolumeSize=1, ParentSnapshotId=parent)["SnapshotId"]
    put(child, 7, ones)
    complete(child, [ones])
    listed = ebs.list_snapshot_blocks(SnapshotId=child, MaxResults=100)
    assert [b["BlockIndex"] for b in listed["Blocks"]] == [0, 7] and listed["VolumeSize"] == 1, listed
    assert listed["ExpiryTime"].timestamp() > time.time() and "NextToken" not in listed, listed
    got = ebs.get_snapshot_block(SnapshotId=child, BlockIndex=7, BlockToken=listed["Blocks"][1]["BlockToken"])
    assert got["BlockData"].read() == ones and got["Checksum"] == told(digest(ones)), got
    assert got["DataLength"] == 524288 and got["ChecksumAlgorithm"] == "SHA256", got
    assert code(ebs.get_snapshot_block, SnapshotId=child, BlockIndex=7, BlockToken="AAAA") == "ValidationException"
    changed = ebs.list_changed_blocks(FirstSnapshotId=parent, SecondSnapshotId=child)["ChangedBlocks"]
    assert [b["BlockIndex"] for b in changed] == [7] and changed[0]["FirstBlockToken"], changed
    try:
        ebs.list_snapshot_blocks(SnapshotId="snap-0123456789abcdef0")
    except ebs.exceptions.ResourceNotFoundException as error:
        assert error.response["Reason"] == "SNAPSHOT_NOT_FOUND", error.response
    else:
        raise AssertionError("a snapshot that is not there")
    copy = ec2.copy_snapshot(SourceRegion="us-east-1", SourceSnapshotId=child, TagSpecifications=tags("snapshot", run="r"))
    assert pairs(copy["Tags"]) == {"run": "r"}, copy
    ec2.get_waiter("snapshot_completed").wait(SnapshotIds=[copy["SnapshotId"]])
    for snapshot in (copy["SnapshotId"], child, parent):
        ec2.delete_snapshot(SnapshotId=snapshot)


try:
    story()
    blocks()
finally:
    server.terminate()
    status = server.wait()
assert status == 0, f"the server ended with {status}"
print(f"driven by boto3: {len(done)} actions: {', '.join(sorted(done))}")
