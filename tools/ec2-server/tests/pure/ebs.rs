//! EBS's manners, one by one: snapshots by their blocks.

use crate::support::ebs::{self, AUTH, BLOCK, Line, base64, block, digest, of_block, of_blocks, of_list};
use crate::support::{TestServer, eventually, pause};
use oven_ec2_server::{Delays, Direct, DirectThrottle, Fault, Server, ServerOptions, Turn, What};
use serde_json::json;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn with(direct: Direct) -> TestServer {
    TestServer::new(ServerOptions { direct, ..ServerOptions::default() })
}

fn with_faults(faults: Vec<Fault>) -> TestServer {
    TestServer::new(ServerOptions { faults, ..ServerOptions::default() })
}

#[test]
fn a_snapshot_is_written_and_read() {
    let ground = TestServer::plain();
    let asked = json!({"VolumeSize": 1, "Description": "web", "Timeout": 60, "ClientToken": "t",
        "Tags": [{"Key": "oven:run", "Value": "r"}, {"Key": "k", "Value": ""}]});
    let started = ground.start_with(asked).json();
    assert_eq!((&started["Status"], &started["BlockSize"]), (&json!("pending"), &json!(BLOCK)));
    assert_eq!((&started["OwnerId"], &started["VolumeSize"]), (&json!("123456789012"), &json!(1)));
    let id = started["SnapshotId"].as_str().unwrap();
    let by_tag = ground.good(
        "DescribeSnapshots",
        &[("Filter.1.Name", "tag:oven:run"), ("Filter.1.Value.1", "r"), ("Owner.1", "self")],
    );
    assert_eq!(
        (by_tag.get("snapshotId").unwrap(), by_tag.get("status").unwrap()),
        (id.into(), "pending".into())
    );
    assert_eq!(
        (by_tag.get("description").unwrap(), by_tag.get("volumeSize").unwrap()),
        ("web".into(), "1".into())
    );
    assert_eq!(
        (by_tag.get("volumeId").unwrap(), by_tag.get("progress")),
        ("vol-ffffffff".into(), Some(String::new()))
    );
    let put = ground.put(id, 5, &block(5));
    assert_eq!((put.status, put.header("x-amz-checksum-algorithm")), (201, "SHA256"));
    assert_eq!(put.header("x-amz-checksum"), base64(digest(&block(5))));
    // The same again changes nothing; something else overwrites it.
    assert_eq!(ground.put(id, 5, &block(5)).status, 201);
    assert_eq!(ground.put(id, 2047, &block(1)).status, 201);
    assert_eq!(ground.put(id, 2047, &block(2)).status, 201);
    let completed = ground.complete(id, &[&block(5), &block(2)]);
    assert_eq!((completed.status, &completed.json()["Status"]), (202, &json!("pending")));
    eventually("completed", || ground.snapshot_state(id) == "completed");
    let told = ground.good("DescribeSnapshots", &[("SnapshotId.1", id)]);
    assert_eq!(told.get("progress").unwrap(), "100%");
    let list = ground.blocks(id, "").json();
    assert_eq!(
        (&list["VolumeSize"], &list["BlockSize"], &list["NextToken"]),
        (&json!(1), &json!(BLOCK), &json!(null))
    );
    let listed = of_list(&list);
    assert_eq!(listed.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [5, 2047]);
    let got = ground.get(id, 2047, &listed[1].1);
    assert_eq!((got.status, got.header("content-type")), (200, "application/octet-stream"));
    assert_eq!(
        (got.header("x-amz-data-length"), got.header("x-amz-checksum-algorithm")),
        ("524288", "SHA256")
    );
    assert!(got.body == block(2) && got.header("x-amz-checksum") == base64(digest(&block(2))));
    // What is written is all that is there.
    let image = ground.register("web", id, &[]);
    assert_eq!(image.status, 200, "{}", image.body);
    let entry = ground.server.ledger().snapshots.into_iter().find(|entry| entry.id == id).unwrap();
    let data = std::fs::File::open(entry.data.unwrap()).unwrap();
    let byte_at = |at: usize| {
        let mut byte = [9];
        data.read_exact_at(&mut byte, at as u64).unwrap();
        byte[0]
    };
    assert_eq!(data.metadata().unwrap().len(), 1 << 30);
    assert_eq!([5, 6, 2047].map(|block| byte_at(block * BLOCK)), [5, 0, 2]);
    let calls = ground.server.ebs_calls();
    assert_eq!((calls[0].action.as_str(), calls[0].made.as_deref()), ("StartSnapshot", Some(id)));
    assert_eq!((calls[1].params["BlockIndex"].as_str(), calls[1].answer.as_str()), ("5", "201"));
}

#[test]
fn a_child_has_what_its_parent_has() {
    let ground = TestServer::plain();
    let parent = ground.written(json!({"VolumeSize": 1}), &[(1, block(1)), (2, block(2)), (3, block(3))]);
    let of = json!({"VolumeSize": 2, "ParentSnapshotId": parent});
    // A block that became zero is written, and one may be as it was.
    let child = ground.written(of, &[(2, block(0)), (3, block(3)), (4000, block(9))]);
    let listed = ground.listed(&child);
    assert_eq!(listed.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [1, 2, 3, 4000]);
    for ((index, token), byte) in listed.iter().zip([1, 0, 3, 9]) {
        assert!(ground.get(&child, *index, token).body == block(byte), "block {index}");
    }
    let changed =
        |query: &str| ground.ebs("GET", &format!("/snapshots/{child}/changedblocks{query}"), "", b"");
    let differ = changed(&format!("?firstSnapshotId={parent}")).json();
    let differ = differ["ChangedBlocks"].as_array().unwrap();
    assert_eq!(differ.iter().map(|b| b["BlockIndex"].as_u64().unwrap()).collect::<Vec<_>>(), [2, 4000]);
    assert!(ground.get(&parent, 2, differ[0]["FirstBlockToken"].as_str().unwrap()).body == block(2));
    assert!(ground.get(&child, 2, differ[0]["SecondBlockToken"].as_str().unwrap()).body == block(0));
    assert!(differ[1]["FirstBlockToken"].is_null() && differ[1]["SecondBlockToken"].is_string());
    assert_eq!(changed("").json()["ChangedBlocks"].as_array().unwrap().len(), 4);
    let stranger = ground.written(json!({"VolumeSize": 1}), &[(1, block(1))]);
    let refused = changed(&format!("?firstSnapshotId={stranger}")).error();
    assert_eq!(refused, "ValidationException UNRELATED_SNAPSHOTS");
}

#[test]
fn checksums_are_verified() {
    let ground = TestServer::plain();
    let id = ground.start(json!({"VolumeSize": 1}));
    let put = |path: &str, headers: &str, body: &[u8]| {
        ground.ebs("PUT", &format!("/snapshots/{id}/blocks/{path}"), headers, body).error()
    };
    let (one, good) = (block(1), of_block(&block(1)));
    assert_eq!(put("0", &good, &block(2)), "ValidationException INVALID_BLOCK");
    for (wrong, with) in [
        ("x-amz-Checksum: ", "x-other: "),
        ("x-amz-Checksum: ", "x-amz-Checksum: A"),
        ("SHA256", "MD5"),
        ("x-amz-Checksum-Algorithm", "x-other"),
        ("x-amz-Data-Length", "x-other"),
        ("524288", "524287"),
    ] {
        let headers = good.replacen(wrong, with, 1);
        assert_eq!(put("0", &headers, &one), "ValidationException INVALID_PARAMETER_VALUE", "{with}");
    }
    let short = vec![1; 4096];
    assert_eq!(put("0", &of_block(&short), &short), "ValidationException INVALID_PARAMETER_VALUE");
    assert_eq!(put("0", &good, &short), "ValidationException INVALID_PARAMETER_VALUE");
    assert_eq!(put("2048", &good, &one), "ValidationException INVALID_BLOCK");
    assert_eq!(put("x", &good, &one), "ValidationException INVALID_PARAMETER_VALUE");
    // Nothing of it was written.
    assert_eq!(ground.complete(&id, &[&one]).error(), "ValidationException INVALID_PARAMETER_VALUE");
    assert_eq!(ground.put(&id, 0, &one).status, 201);
    for wrong in [
        of_blocks(&[&one, &one]),
        of_blocks(&[&block(2)]),
        of_blocks(&[&one]).replace("LINEAR", "TREE"),
        of_blocks(&[&one]).replace("x-amz-Checksum-Aggregation-Method", "x-other"),
        of_blocks(&[&one]).replace("x-amz-ChangedBlocksCount", "x-other"),
    ] {
        let refused = ground.ebs("POST", &format!("/snapshots/completion/{id}"), &wrong, b"").error();
        assert_eq!(refused, "ValidationException INVALID_PARAMETER_VALUE", "{wrong}");
    }
    assert_eq!(ground.snapshot_state(&id), "pending");
    // A count alone will do.
    let counted =
        ground.ebs("POST", &format!("/snapshots/completion/{id}"), "x-amz-ChangedBlocksCount: 1\r\n", b"");
    assert_eq!(counted.status, 202);
}

#[test]
fn a_token_is_of_one_block_and_for_a_time() {
    let ground = with(Direct { block_tokens: ms(4000), ..Direct::default() });
    let id = ground.written(json!({"VolumeSize": 1}), &[(0, block(1)), (1, block(1))]);
    let listed = ground.listed(&id);
    assert_eq!(ground.get(&id, 0, &listed[0].1).status, 200);
    let refused = "ValidationException INVALID_BLOCK_TOKEN";
    assert_eq!(ground.get(&id, 0, &listed[1].1).error(), refused);
    assert_eq!(ground.get(&ground.snapshot, 0, &listed[0].1).error(), refused);
    assert_eq!(ground.get(&id, 0, "AAAA").error(), refused);
    assert_eq!(
        ground.ebs("GET", &format!("/snapshots/{id}/blocks/0"), "", b"").error(),
        "ValidationException INVALID_PARAMETER_VALUE"
    );
    eventually("the token is too old", || ground.get(&id, 0, &listed[0].1).status != 200);
    assert_eq!(ground.get(&id, 0, &listed[0].1).error(), refused);
    assert_eq!(ground.get(&id, 0, &ground.listed(&id)[0].1).status, 200);
}

#[test]
fn lists_have_pages() {
    let direct = Direct { page: Some(2), empty_pages: 1, page_tokens: ms(4000), ..Direct::default() };
    let ground = with(direct);
    let blocks: Vec<(u32, Vec<u8>)> = [3, 7, 8, 20, 2047].map(|index| (index, block(1))).into();
    let id = ground.written(json!({"VolumeSize": 1}), &blocks);
    let escaped = |token: &str| form_urlencoded::byte_serialize(token.as_bytes()).collect::<String>();
    let pages = |first: &str| {
        let (mut pages, mut query) = (Vec::new(), first.to_owned());
        loop {
            let page = ground.blocks(&id, &query).json();
            pages.push(of_list(&page).iter().map(|(index, _)| *index).collect::<Vec<_>>());
            let Some(next) = page["NextToken"].as_str() else { return pages };
            query = format!("?maxResults=100&pageToken={}", escaped(next));
        }
    };
    let empty = Vec::new;
    assert_eq!(pages(""), [empty(), vec![3, 7], empty(), vec![8, 20], empty(), vec![2047]]);
    assert_eq!(pages("?startingBlockIndex=8"), [empty(), vec![8, 20], empty(), vec![2047]]);
    ground.server.set(|o| (o.direct.page, o.direct.empty_pages) = (Some(4), 0));
    assert_eq!(pages(""), [vec![3, 7, 8, 20], vec![2047]]);
    let first = ground.blocks(&id, "").json();
    let token = first["NextToken"].as_str().unwrap();
    let with = |token: &str| ground.blocks(&id, &format!("?pageToken={}", escaped(token)));
    assert_eq!(with(token).status, 200);
    assert_eq!(with("AAAA").error(), "ValidationException INVALID_PAGE_TOKEN");
    let elsewhere = ground.blocks(&ground.snapshot, &format!("?pageToken={}", escaped(token)));
    assert_eq!(elsewhere.error(), "ValidationException INVALID_PAGE_TOKEN");
    eventually("the token is too old", || with(token).status != 200);
    assert_eq!(with(token).error(), "ValidationException INVALID_PAGE_TOKEN");
    for wrong in ["?maxResults=99", "?maxResults=10001", "?startingBlockIndex=-1", "?other=1"] {
        let refused = ground.blocks(&id, wrong).error();
        assert_eq!(refused, "ValidationException INVALID_PARAMETER_VALUE", "{wrong}");
    }
}

#[test]
fn pending_is_for_writing_and_completed_for_reading() {
    let delays = Delays { completing: ms(400), ..Delays::default() };
    let ground = TestServer::new(ServerOptions { delays, ..ServerOptions::default() });
    let id = ground.start(json!({"VolumeSize": 1}));
    let invalid = "ValidationException INVALID_SNAPSHOT_ID";
    assert_eq!(ground.put(&id, 0, &block(1)).status, 201);
    assert_eq!(ground.blocks(&id, "").error(), invalid);
    assert_eq!(
        ground.refused("CreateVolume", &[("SnapshotId", &id), ("AvailabilityZone", "us-east-1a")]),
        "IncorrectState"
    );
    assert_eq!(ground.register("web", &id, &[]).get("Code").unwrap(), "IncorrectState");
    assert_eq!(ground.start_with(json!({"VolumeSize": 1, "ParentSnapshotId": id})).error(), invalid);
    assert_eq!(ground.complete(&id, &[&block(1)]).status, 202);
    // It is sealed, and not complete yet: the same call again says the same.
    assert_eq!(ground.snapshot_state(&id), "pending");
    assert_eq!(ground.put(&id, 1, &block(1)).error(), invalid);
    assert_eq!(ground.complete(&id, &[&block(1)]).status, 202);
    assert_eq!(ground.complete(&id, &[&block(1), &block(1)]).error(), invalid);
    eventually("completed", || ground.snapshot_state(&id) == "completed");
    assert_eq!(ground.put(&id, 1, &block(1)).error(), invalid);
    assert_eq!(ground.complete(&id, &[&block(1)]).error(), invalid);
    // One that was never written by its blocks, and one that is not there.
    assert_eq!(ground.put(&ground.snapshot, 1, &block(1)).error(), invalid);
    let absent = "ResourceNotFoundException SNAPSHOT_NOT_FOUND";
    assert_eq!(ground.put("snap-0123456789abcdef0", 1, &block(1)).error(), absent);
    assert_eq!(ground.blocks("snap-0123456789abcdef0", "").error(), absent);
    assert_eq!(ground.blocks("vol-0123456789abcdef0", "").error(), invalid);
}

#[test]
fn a_snapshot_that_nobody_goes_on_with_is_given_up() {
    let ground = with(Direct { timeout: ms(3000), ..Direct::default() });
    let id = ground.start(json!({"VolumeSize": 1}));
    for _ in 0..3 {
        pause(1100);
        assert_eq!(ground.put(&id, 0, &block(1)).status, 201);
    }
    eventually("given up", || ground.snapshot_state(&id) == "error");
    let invalid = "ValidationException INVALID_SNAPSHOT_ID";
    assert_eq!(ground.put(&id, 0, &block(1)).error(), invalid);
    assert_eq!(ground.complete(&id, &[&block(1)]).error(), invalid);
    assert_eq!(ground.snapshot_state(&id), "error");
    let told = ground.good("DescribeSnapshots", &[("SnapshotId.1", &id)]);
    assert!(told.get("statusMessage").unwrap().contains("in time"));
    let left = ground.server.ledger().made().snapshots;
    assert_eq!((left.len(), left[0].state.as_str()), (1, "error"));
    ground.good("DeleteSnapshot", &[("SnapshotId", &id)]);
    assert!(ground.server.ledger().made().snapshots.is_empty());
}

#[test]
fn a_pending_snapshot_is_deleted() {
    let ground = TestServer::plain();
    let id = ground.start(json!({"VolumeSize": 1, "ParentSnapshotId": ground.snapshot}));
    assert_eq!(ground.put(&id, 9, &block(1)).status, 201);
    let left = ground.server.ledger().made().snapshots;
    assert_eq!((left[0].id.as_str(), left[0].state.as_str()), (id.as_str(), "pending"));
    ground.good("DeleteSnapshot", &[("SnapshotId", &id)]);
    let absent = "ResourceNotFoundException SNAPSHOT_NOT_FOUND";
    assert_eq!(ground.put(&id, 9, &block(1)).error(), absent);
    assert_eq!(ground.complete(&id, &[&block(1)]).error(), absent);
    let files: Vec<_> = std::fs::read_dir(ground.server.dir().join("snapshots")).unwrap().collect();
    assert!(
        files.iter().all(|f| !f.as_ref().unwrap().file_name().to_string_lossy().contains(&id)),
        "{files:?}"
    );
}

#[test]
fn others_snapshots() {
    let ground = TestServer::plain();
    let key = "arn:aws:kms:us-east-1:123456789012:key/mine".to_owned();
    let id = ground.written(json!({"VolumeSize": 1}), &[(0, block(1))]);
    let token = ground.listed(&id).remove(0).1;
    let set = |owner: &str, public: bool, shared: bool, key: Option<&str>| {
        ground.server.with_world(|world| {
            let snapshot = world.snapshots.get_mut(&id).unwrap();
            snapshot.common.owner = owner.to_owned();
            (snapshot.public, snapshot.shared, snapshot.encrypted) = (public, shared, key.is_some());
            snapshot.key = key.map(str::to_owned);
        });
    };
    let child = || ground.start_with(json!({"VolumeSize": 1, "ParentSnapshotId": id}));
    let describe = || ground.call("DescribeSnapshots", &[("SnapshotId.1", &id)]);
    set("099720109477", true, false, None);
    let refused = "AccessDeniedException UNAUTHORIZED_ACCOUNT";
    assert_eq!(
        (ground.blocks(&id, "").error(), ground.get(&id, 0, &token).error()),
        (refused.into(), refused.into())
    );
    assert_eq!((child().error(), ground.blocks(&id, "").status), (refused.into(), 403));
    assert_eq!(describe().get("ownerId").unwrap(), "099720109477");
    // It can be copied, and the copy is ours.
    let copy = ground.good("CopySnapshot", &[("SourceRegion", "us-east-1"), ("SourceSnapshotId", &id)]);
    let copy = copy.get("snapshotId").unwrap();
    assert!(ground.get(&copy, 0, &ground.listed(&copy)[0].1).body == block(1));
    set("210987654321", false, true, None);
    assert_eq!((ground.get(&id, 0, &token).status, child().status, describe().status), (200, 201, 200));
    assert_eq!(ground.refused("DeleteSnapshot", &[("SnapshotId", &id)]), "UnauthorizedOperation");
    set("210987654321", false, false, None);
    assert_eq!(ground.blocks(&id, "").error(), "ResourceNotFoundException SNAPSHOT_NOT_FOUND");
    assert_eq!(child().error(), "ResourceNotFoundException SNAPSHOT_NOT_FOUND");
    assert_eq!(describe().get("Code").unwrap(), "InvalidSnapshot.NotFound");
    assert_eq!(ground.register("web", &id, &[]).get("Code").unwrap(), "InvalidSnapshot.NotFound");
    // With a key that may not be used, and with one that may.
    set("123456789012", false, false, Some(&key));
    assert_eq!(ground.blocks(&id, "").error(), "AccessDeniedException DEPENDENCY_ACCESS_DENIED");
    assert_eq!(child().error(), "AccessDeniedException DEPENDENCY_ACCESS_DENIED");
    ground.server.set(|options| _ = options.keys.insert(key.clone()));
    let child = child().json();
    assert_eq!(child["KmsKeyArn"], json!(key));
    let told = ground.good("DescribeSnapshots", &[("SnapshotId.1", child["SnapshotId"].as_str().unwrap())]);
    assert_eq!((told.get("encrypted").unwrap(), told.get("kmsKeyId").unwrap()), ("true".into(), key));
    // A copy gets the account's own key, unless another one is said.
    let copy = ground.good("CopySnapshot", &[("SourceRegion", "us-east-1"), ("SourceSnapshotId", &id)]);
    let told = ground.good("DescribeSnapshots", &[("SnapshotId.1", &copy.get("snapshotId").unwrap())]);
    assert_eq!(told.get("kmsKeyId").unwrap(), ServerOptions::default().default_key());
}

#[test]
fn what_is_started_has_rules() {
    let ground = TestServer::plain();
    let key = "arn:aws:kms:us-east-1:123456789012:key/0123";
    let parent = ground.written(json!({"VolumeSize": 2}), &[]);
    let long = |n: usize| "x".repeat(n);
    for (asked, reason) in [
        (json!({}), "INVALID_PARAMETER_VALUE"),
        (json!({"VolumeSize": 0}), "INVALID_VOLUME_SIZE"),
        (json!({"VolumeSize": 65537}), "INVALID_VOLUME_SIZE"),
        (json!({"VolumeSize": 1, "ParentSnapshotId": parent}), "INVALID_VOLUME_SIZE"),
        (json!({"VolumeSize": 2, "ParentSnapshotId": parent, "Encrypted": true}), "INVALID_PARAMETER_VALUE"),
        (json!({"VolumeSize": 2, "ParentSnapshotId": parent, "KmsKeyArn": key}), "INVALID_PARAMETER_VALUE"),
        (json!({"VolumeSize": 2, "ParentSnapshotId": "ami-1"}), "INVALID_SNAPSHOT_ID"),
        (json!({"VolumeSize": 2, "KmsKeyArn": key}), "INVALID_PARAMETER_VALUE"),
        (json!({"VolumeSize": 2, "Encrypted": true, "KmsKeyArn": "alias/aws/ebs"}), "INVALID_CUSTOMER_KEY"),
        (json!({"VolumeSize": 1, "Timeout": 9}), "INVALID_PARAMETER_VALUE"),
        (json!({"VolumeSize": 1, "Timeout": 4321}), "INVALID_PARAMETER_VALUE"),
        (json!({"VolumeSize": 1, "Description": ""}), "INVALID_PARAMETER_VALUE"),
        (json!({"VolumeSize": 1, "Description": long(256)}), "INVALID_PARAMETER_VALUE"),
        (json!({"VolumeSize": 1, "ClientToken": "a b"}), "INVALID_PARAMETER_VALUE"),
        (json!({"VolumeSize": 1, "ClientToken": long(256)}), "INVALID_PARAMETER_VALUE"),
        (json!({"VolumeSize": 1, "Unknown": 1}), "INVALID_PARAMETER_VALUE"),
        (json!({"VolumeSize": 1, "Tags": [{"Key": "aws:x", "Value": ""}]}), "INVALID_TAG"),
        (json!({"VolumeSize": 1, "Tags": [{"Value": ""}]}), "INVALID_TAG"),
        (json!({"VolumeSize": 1, "Tags": [{"Key": "a"}, {"Key": "a"}]}), "INVALID_TAG"),
        (json!({"VolumeSize": 1, "Tags": [{"Key": long(128), "Value": ""}]}), "INVALID_TAG"),
        (json!({"VolumeSize": 1, "Tags": [{"Key": "a", "Value": long(256)}]}), "INVALID_TAG"),
    ] {
        assert_eq!(
            ground.start_with(asked.clone()).error(),
            format!("ValidationException {reason}"),
            "{asked}"
        );
    }
    assert_eq!(ground.ebs("POST", "/snapshots", "", b"x").error(), "SerializationException");
    let foreign = ground.start_with(json!({"VolumeSize": 1, "Encrypted": true, "KmsKeyArn": key}));
    assert_eq!(foreign.error(), "AccessDeniedException DEPENDENCY_ACCESS_DENIED");
    assert_eq!(ground.server.ledger().made().snapshots.len(), 1);
    let own = ground.start_with(json!({"VolumeSize": 1, "Encrypted": true})).json();
    assert!(own["KmsKeyArn"].as_str().unwrap().starts_with("arn:aws:kms:us-east-1:123456789012:key/"));
    let child = ground.start_with(json!({"VolumeSize": 2, "ParentSnapshotId": parent})).json();
    assert_eq!(child["ParentSnapshotId"], json!(parent));
}

#[test]
fn a_token_starts_one_snapshot() {
    let ground = TestServer::plain();
    let asked = json!({"VolumeSize": 1, "ClientToken": "t", "Tags": [{"Key": "a", "Value": "b"}]});
    let ids: Vec<String> = std::thread::scope(|scope| {
        let calls: Vec<_> = (0..8).map(|_| scope.spawn(|| ground.start(asked.clone()))).collect();
        calls.into_iter().map(|call| call.join().unwrap()).collect()
    });
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    let other = ground.start_with(json!({"VolumeSize": 2, "ClientToken": "t"}));
    assert_eq!((other.status, other.error().as_str()), (409, "ConflictException"));
    assert_ne!(ground.start(json!({"VolumeSize": 1, "ClientToken": "u"})), ids[0]);
    assert_ne!(ground.start(json!({"VolumeSize": 1})), ids[0]);
    assert_eq!(ground.server.ledger().made().snapshots.len(), 3);
}

#[test]
fn too_much_is_refused() {
    // So slow that nothing comes back between two calls, however busy the machine is.
    let slow = 0.25;
    let throttle =
        DirectThrottle { gets: (2.0, slow), puts: (2.0, slow), lists: (2.0, slow), snapshots: (4.0, slow) };
    let ground = with(Direct { throttle: Some(throttle), pending: 2, ..Direct::default() });
    let (one, other) = (ground.start(json!({"VolumeSize": 1})), ground.start(json!({"VolumeSize": 1})));
    let third = ground.start_with(json!({"VolumeSize": 1}));
    assert_eq!((third.status, third.error().as_str()), (400, "ConcurrentLimitExceededException"));
    let again = ground.start_with(json!({"VolumeSize": 1}));
    assert_eq!((again.status, again.error().as_str()), (400, "ConcurrentLimitExceededException"));
    let again = ground.start_with(json!({"VolumeSize": 1}));
    assert_eq!((again.status, again.error().as_str()), (400, "RequestThrottledException ACCOUNT_THROTTLED"));
    let mut line = Line::open(&ground.server.endpoint());
    let mut path = |id: &str| line.call("PUT", &format!("/snapshots/{id}/blocks/0"), "", b"");
    // Each snapshot has a bucket of its own, and a call that is refused for something else counts.
    let refused = |reply: ebs::Reply| reply.error().starts_with("RequestThrottledException RESOURCE");
    let told = [path(&one), path(&one), path(&one), path(&other)].map(refused);
    assert_eq!(told, [false, false, true, false]);
    eventually("a call more", || !refused(path(&one)));
    ground.good("DeleteSnapshot", &[("SnapshotId", &one)]);
    eventually("a snapshot more", || ground.start_with(json!({"VolumeSize": 1})).status == 201);
}

#[test]
fn faults_befall_blocks() {
    let read = "Failed to read block data";
    let faults = vec![
        Fault::new("PutSnapshotBlock", 1, What::ErrorSaying("ValidationException".into(), read.into())),
        Fault::new("PutSnapshotBlock", 2, What::DropAfter),
        Fault::new("PutSnapshotBlock", 3, What::Error("ThrottlingException".into())),
        Fault::new("PutSnapshotBlock", 4, What::StatusBefore(503)),
        Fault::new("PutSnapshotBlock", 5, What::ErrorAfter("InternalServerException".into())),
        Fault::new("PutSnapshotBlock", 6, What::HangAfter),
        Fault::new("GetSnapshotBlock", 1, What::Flipped),
        Fault::new("GetSnapshotBlock", 2, What::Error("ValidationException:INVALID_BLOCK_TOKEN".into())),
        Fault::new("CompleteSnapshot", 1, What::DropAfter),
        Fault::new("ListSnapshotBlocks", 1, What::Stale),
    ];
    let ground = with_faults(faults);
    let id = ground.start(json!({"VolumeSize": 1}));
    let refused = ground.put(&id, 0, &block(0));
    assert_eq!(
        (refused.error().as_str(), refused.json()["Message"].as_str()),
        ("ValidationException INVALID_PARAMETER_VALUE", Some(read))
    );
    let quiet = |index: u32| {
        let mut line = Line::open(&ground.server.endpoint());
        line.patience(500);
        let byte = block(index as u8);
        line.try_call("PUT", &format!("/snapshots/{id}/blocks/{index}"), &of_block(&byte), &byte)
    };
    assert!(quiet(1).is_none());
    assert_eq!(ground.put(&id, 2, &block(2)).error(), "ThrottlingException");
    assert_eq!(ground.put(&id, 3, &block(3)).status, 503);
    let after = ground.put(&id, 4, &block(4));
    assert_eq!((after.status, after.error().as_str()), (500, "InternalServerException"));
    assert!(quiet(5).is_none());
    // Those whose answers were lost are there.
    let blocks = [block(1), block(4), block(5)];
    let blocks: Vec<&[u8]> = blocks.iter().map(|block| &block[..]).collect();
    let lost = Line::open(&ground.server.endpoint()).try_call(
        "POST",
        &format!("/snapshots/completion/{id}"),
        &of_blocks(&blocks),
        b"",
    );
    assert!(lost.is_none());
    eventually("completed", || ground.snapshot_state(&id) == "completed");
    assert_eq!(ground.blocks(&id, "").error(), "ValidationException INVALID_SNAPSHOT_ID");
    let listed = ground.listed(&id);
    let flipped = ground.get(&id, 1, &listed[0].1);
    assert_eq!(flipped.header("x-amz-checksum"), base64(digest(&block(1))));
    let differ: u32 = flipped.body.iter().map(|byte| (byte ^ 1).count_ones()).sum();
    assert_eq!((flipped.body.len(), differ), (BLOCK, 1));
    assert_eq!(ground.get(&id, 1, &listed[0].1).error(), "ValidationException INVALID_BLOCK_TOKEN");
    assert!(ground.get(&id, 1, &listed[0].1).body == block(1));
    let answers: Vec<String> = ground.server.ebs_calls().into_iter().map(|call| call.answer).collect();
    assert!(
        answers.contains(&"201 DropAfter".into()) && answers.contains(&"200 Flipped".into()),
        "{answers:?}"
    );
}

#[test]
fn snapshots_turn_out_badly() {
    let faults = vec![
        Fault::new("StartSnapshot", 1, What::Turns(Turn::Untagged)),
        Fault::new("StartSnapshot", 2, What::Turns(Turn::Failed)),
        Fault::new("CompleteSnapshot", 1, What::Turns(Turn::Failed)),
        Fault::new("CompleteSnapshot", 2, What::Turns(Turn::Stuck)),
    ];
    let ground = with_faults(faults);
    let asked = json!({"VolumeSize": 1, "Tags": [{"Key": "a", "Value": "b"}]});
    let untagged = ground.start(asked.clone());
    assert!(ground.server.with_world(|world| world.snapshots[&untagged].common.tags.is_empty()));
    let failed = ground.start(asked.clone());
    assert_eq!(ground.snapshot_state(&failed), "error");
    assert_eq!(ground.put(&failed, 0, &block(1)).error(), "ValidationException INVALID_SNAPSHOT_ID");
    assert_eq!(ground.complete(&untagged, &[]).status, 202);
    eventually("error", || ground.snapshot_state(&untagged) == "error");
    let stuck = ground.start(asked);
    assert_eq!(ground.complete(&stuck, &[]).status, 202);
    pause(300);
    let told = ground.good("DescribeSnapshots", &[("SnapshotId.1", &stuck)]);
    assert_eq!(
        (told.get("status").unwrap(), told.get("progress").unwrap()),
        ("pending".into(), "99%".into())
    );
}

#[test]
fn a_new_id_is_not_known_at_once() {
    let ground = TestServer::new(ServerOptions { visibility_lag: ms(2000), ..ServerOptions::default() });
    let id = ground.start(json!({"VolumeSize": 1}));
    assert_eq!(ground.put(&id, 0, &block(1)).error(), "ResourceNotFoundException SNAPSHOT_NOT_FOUND");
    eventually("known", || ground.put(&id, 0, &block(1)).status == 201);
}

#[test]
fn answers_take_their_time() {
    let latencies =
        [("*", 0, 0), ("Put*", 120, 160), ("PutSnapshotBlock", 40, 60), ("DescribeSnapshots", 80, 90)];
    let latencies = latencies.map(|(action, least, most)| (action.to_owned(), (least, most))).into();
    let ground = TestServer::new(ServerOptions { latencies, ..ServerOptions::default() });
    let took = |call: &dyn Fn()| {
        let start = Instant::now();
        call();
        start.elapsed()
    };
    let id = ground.start(json!({"VolumeSize": 1}));
    assert!(took(&|| assert_eq!(ground.put(&id, 0, &block(1)).status, 201)) >= ms(40));
    assert!(took(&|| assert_eq!(ground.snapshot_state(&id), "pending")) >= ms(80));
    let slow = ServerOptions::default().plausible();
    assert_eq!(
        (slow.latency("GetSnapshotBlock"), slow.latency("DescribeImages")),
        (Some((60, 140)), Some((80, 150)))
    );
    assert!(slow.delays.creating >= ms(1000) && slow.delays.snapshot > slow.delays.completing);
}

#[test]
fn what_is_not_permitted() {
    let policy = json!({"Statement": [
        {"Effect": "Allow", "Action": "ebs:StartSnapshot", "Resource": "arn:aws:ec2:*::snapshot/*",
         "Condition": {"Null": {"aws:RequestTag/oven:run": "false"}}},
        {"Effect": "Allow", "Action": "ebs:PutSnapshotBlock", "Resource": "*",
         "Condition": {"StringLike": {"aws:ResourceTag/oven:run": "*"}}},
    ]});
    let ground = TestServer::new(ServerOptions { policy: Some(policy), ..ServerOptions::default() });
    let refused = "AccessDeniedException UNAUTHORIZED_ACCOUNT";
    assert_eq!(ground.start_with(json!({"VolumeSize": 1})).error(), refused);
    let id = ground.start(json!({"VolumeSize": 1, "Tags": [{"Key": "oven:run", "Value": "r"}]}));
    assert_eq!(ground.put(&id, 0, &block(1)).status, 201);
    let denied = ground.complete(&id, &[&block(1)]);
    assert_eq!((denied.status, denied.error().as_str()), (403, refused));
    // Who says that it is for another service, or for nobody.
    let mut line = Line::open(&ground.server.endpoint());
    for (auth, code) in [
        (AUTH.replace("/ebs/", "/ec2/"), "InvalidSignatureException"),
        (AUTH.replace("us-east-1", "eu-west-1"), "UnrecognizedClientException"),
        (String::new(), "MissingAuthenticationTokenException"),
    ] {
        line.write(format!("GET /snapshots/{id}/blocks HTTP/1.1\r\nHost: x\r\n{auth}\r\n").as_bytes());
        let reply = line.read().unwrap();
        assert_eq!((reply.status, reply.error().as_str()), (403, code));
    }
    let unknown = line.call("DELETE", &format!("/snapshots/{id}"), "", b"");
    assert_eq!((unknown.status, unknown.error().as_str()), (404, "UnknownOperationException"));
}

#[test]
fn a_copy_of_a_snapshot() {
    let delays = Delays { copying: ms(300), ..Delays::default() };
    let ground = TestServer::new(ServerOptions { delays, ..ServerOptions::default() });
    let here = ("SourceRegion", "us-east-1");
    let source = ("SourceSnapshotId", ground.snapshot.as_str());
    let tags = [
        ("TagSpecification.1.ResourceType", "snapshot"),
        ("TagSpecification.1.Tag.1.Key", "oven:base"),
        ("TagSpecification.1.Tag.1.Value", "x"),
    ];
    let made = ground.good(
        "CopySnapshot",
        &[&[here, source, ("Description", "d"), ("Encrypted", "true")][..], &tags].concat(),
    );
    let id = made.get("snapshotId").unwrap();
    assert_eq!(made.get("key").unwrap(), "oven:base");
    assert_eq!(ground.snapshot_state(&id), "pending");
    assert_eq!(ground.blocks(&id, "").error(), "ValidationException INVALID_SNAPSHOT_ID");
    eventually("completed", || ground.snapshot_state(&id) == "completed");
    let told = ground.good("DescribeSnapshots", &[("SnapshotId.1", &id)]);
    assert_eq!(
        (told.get("encrypted").unwrap(), told.get("description").unwrap()),
        ("true".into(), "d".into())
    );
    assert!(told.get("kmsKeyId").unwrap().contains(":key/"));
    assert!(ground.get(&id, 1, &ground.listed(&id)[1].1).body == block(7));
    for (more, code) in [
        ([("SourceRegion", "eu-west-1"), source], "InvalidParameterValue"),
        ([("SourceRegion", ""), source], "MissingParameter"),
        ([here, ("SourceSnapshotId", "snap-0123456789abcdef0")], "InvalidSnapshot.NotFound"),
    ] {
        assert_eq!(ground.refused("CopySnapshot", &more), code);
    }
    for (more, code) in [
        (("Encrypted", "false"), "InvalidParameterValue"),
        (("KmsKeyId", "alias/aws/ebs"), "InvalidParameterDependency"),
        (("ClientToken", "t"), "UnknownParameter"),
        (("DryRun", "true"), "DryRunOperation"),
    ] {
        assert_eq!(ground.refused("CopySnapshot", &[here, source, more]), code);
    }
    // A key that may not be used is found out later.
    let wrong = [here, source, ("Encrypted", "true"), ("KmsKeyId", "alias/other")];
    let wrong = ground.good("CopySnapshot", &wrong).get("snapshotId").unwrap();
    eventually("error", || ground.snapshot_state(&wrong) == "error");
    assert_eq!(ground.server.ledger().made().snapshots.len(), 2);
}

#[test]
fn a_body_comes_as_it_comes() {
    let ground = TestServer::plain();
    let id = ground.start(json!({"VolumeSize": 1}));
    let mut line = Line::open(&ground.server.endpoint());
    let mut index = 0;
    let mut head = |more: &str, block: &[u8]| {
        index += 1;
        format!(
            "PUT /snapshots/{id}/blocks/{index} HTTP/1.1\r\nHost: x\r\n{AUTH}{}{more}\r\n",
            of_block(block)
        )
        .into_bytes()
    };
    // In pieces, the head too.
    let one = block(1);
    let whole = [head(&format!("Content-Length: {BLOCK}\r\n"), &one), one.clone()].concat();
    for piece in [&whole[..10], &whole[10..300], &whole[300..100_000], &whole[100_000..]] {
        line.write(piece);
        pause(20);
    }
    assert_eq!(line.read().unwrap().status, 201);
    // Not before it may.
    line.write(&head(&format!("Content-Length: {BLOCK}\r\nExpect: 100-continue\r\n"), &one));
    assert_eq!(line.read().unwrap().status, 100);
    line.write(&one);
    assert_eq!(line.read().unwrap().status, 201);
    // In chunks of HTTP, and in signed ones within a body with a length.
    let chunks = |signature: &str, end: &str| {
        let mut chunks = Vec::new();
        for chunk in one.chunks(100_000) {
            chunks.extend_from_slice(format!("{:x}{signature}\r\n", chunk.len()).as_bytes());
            chunks.extend_from_slice(chunk);
            chunks.extend_from_slice(b"\r\n");
        }
        chunks.extend_from_slice(format!("0{signature}\r\n{end}\r\n").as_bytes());
        chunks
    };
    line.write(&[head("Transfer-Encoding: chunked\r\n", &one), chunks("", "")].concat());
    assert_eq!(line.read().unwrap().status, 201);
    let signed = chunks(";chunk-signature=0a", "x-amz-checksum-crc32: AAAA\r\n");
    let more = format!(
        "Content-Encoding: aws-chunked\r\nContent-Length: {}\r\nx-amz-decoded-content-length: {BLOCK}\r\n",
        signed.len()
    );
    line.write(&[head(&more, &one), signed].concat());
    assert_eq!(line.read().unwrap().status, 201);
    // Two at once.
    let (two, three) = (block(2), block(3));
    let more = format!("Content-Length: {BLOCK}\r\n");
    line.write(&[head(&more, &two), two.clone(), head(&more, &three), three.clone()].concat());
    assert_eq!((line.read().unwrap().status, line.read().unwrap().status), (201, 201));
    assert_eq!(ground.complete(&id, &[&one, &one, &one, &one, &two, &three]).status, 202);
}

#[test]
fn many_at_once_on_lines_that_stay() {
    let ground = TestServer::plain();
    let id = ground.start(json!({"VolumeSize": 1}));
    let blocks: Vec<Vec<u8>> = (0..128_u32).map(|i| [i.to_be_bytes(); BLOCK / 4].concat()).collect();
    std::thread::scope(|scope| {
        for worker in 0..64 {
            let (id, blocks, endpoint) = (&id, &blocks, ground.server.endpoint());
            scope.spawn(move || {
                let mut line = Line::open(&endpoint);
                for (index, block) in blocks.iter().enumerate().skip(worker).step_by(64) {
                    assert_eq!(line.put(id, index as u32, block).status, 201);
                }
            });
        }
    });
    let all: Vec<&[u8]> = blocks.iter().map(|block| &block[..]).collect();
    assert_eq!(ground.complete(&id, &all).status, 202);
    eventually("completed", || ground.snapshot_state(&id) == "completed");
    let listed = ground.listed(&id);
    assert_eq!(listed.len(), blocks.len());
    std::thread::scope(|scope| {
        for worker in 0..64 {
            let (id, blocks, listed, endpoint) = (&id, &blocks, &listed, ground.server.endpoint());
            scope.spawn(move || {
                let mut line = Line::open(&endpoint);
                for (index, token) in listed.iter().skip(worker).step_by(64) {
                    let token: String = form_urlencoded::byte_serialize(token.as_bytes()).collect();
                    let got = line.call(
                        "GET",
                        &format!("/snapshots/{id}/blocks/{index}?blockToken={token}"),
                        "",
                        b"",
                    );
                    assert!(got.status == 200 && got.body == blocks[*index as usize]);
                }
            });
        }
    });
}

#[test]
fn the_next_server_goes_on() {
    let TestServer { server, image, snapshot, dir } = TestServer::plain();
    let region = server.dir().to_owned();
    let ground = TestServer { server, image, snapshot, dir };
    let id = ground.start(json!({"VolumeSize": 1, "Tags": [{"Key": "a", "Value": "b"}]}));
    assert_eq!(ground.put(&id, 0, &block(1)).status, 201);
    let TestServer { server, image, snapshot, dir } = ground;
    drop(server);
    let server = Server::start(&region, ServerOptions::default()).unwrap();
    let ground = TestServer { server, image, snapshot, dir };
    assert_eq!(ground.put(&id, 1, &block(2)).status, 201);
    assert_eq!(ground.complete(&id, &[&block(1), &block(2)]).status, 202);
    eventually("completed", || ground.snapshot_state(&id) == "completed");
    assert!(ground.get(&id, 0, &ground.listed(&id)[0].1).body == block(1));
}

#[test]
fn another_process_changes_whose_it_is() {
    let ground = TestServer::plain();
    let text = json!({"id": ground.snapshot, "owner": "099720109477", "public": true}).to_string();
    assert_eq!(ground.ebs("POST", "/_oven/snapshot", "", text.as_bytes()).status, 200);
    assert_eq!(ground.blocks(&ground.snapshot, "").error(), "AccessDeniedException UNAUTHORIZED_ACCOUNT");
    let direct = json!({"direct": {"page": 1, "empty_pages": 2}, "latencies": {"*": [0, 1]}}).to_string();
    assert_eq!(ground.ebs("POST", "/_oven/options", "", direct.as_bytes()).status, 200);
    let unknown = json!({"direct": {"pages": 1}}).to_string();
    assert_eq!(ground.ebs("POST", "/_oven/options", "", unknown.as_bytes()).status, 400);
}
