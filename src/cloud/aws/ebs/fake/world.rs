//! Implements the answers of a server that behaves correctly.

use super::{Answer, Request, StoredSnapshot, World, answer, refusal};
use crate::ids::BLOCK;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;

impl World {
    pub fn act(&mut self, request: &Request) -> Answer {
        match request.action.as_str() {
            "DescribeSnapshots" => self.describe(request),
            "GetEbsEncryptionByDefault" => {
                let text = format!("<ebsEncryptionByDefault>{}</ebsEncryptionByDefault>", self.encrypts);
                xml(request, &text)
            }
            "DeleteSnapshot" => match self.snapshots.remove(request.get("SnapshotId")) {
                Some(_) => xml(request, "<return>true</return>"),
                None => refusal(400, "InvalidSnapshot.NotFound", "no such snapshot", "", false),
            },
            "CopySnapshot" => {
                let mut copy = self.snapshots[request.get("SourceSnapshotId")].clone();
                (copy.owner, copy.state, copy.tags) = ("self", self.ends, request_tags(request));
                copy.key = request.params.get("kmskeyid").cloned();
                let id = self.insert(copy);
                xml(request, &format!("<snapshotId>{id}</snapshotId>"))
            }
            "StartSnapshot" => self.start(&request.json()),
            _ => {
                let (id, world) = (request.get("snapshot").to_owned(), (self.page, self.empty, self.age));
                let ends = self.ends;
                match self.snapshots.get_mut(&id) {
                    None => {
                        refusal(404, "ResourceNotFoundException", "no snapshot", "SNAPSHOT_NOT_FOUND", true)
                    }
                    Some(stored) => match request.action.as_str() {
                        "ListSnapshotBlocks" => list(stored, request, world),
                        "GetSnapshotBlock" => get(stored, request, world.2),
                        "PutSnapshotBlock" => put(stored, request),
                        "CompleteSnapshot" => complete(stored, request, ends),
                        action => panic!("{action}"),
                    },
                }
            }
        }
    }

    fn insert(&mut self, stored: StoredSnapshot) -> String {
        let id = format!("snap-1{:016}", self.calls.len());
        self.snapshots.insert(id.clone(), stored);
        id
    }

    fn describe(&self, request: &Request) -> Answer {
        let owner = match request.get("RestorableBy.1") {
            "" => "self",
            "self" => "private",
            all => all,
        };
        let wanted = request.filter("snapshot-id");
        let tag = request.filter("tag:oven:copy-of").map(|value| ("oven:copy-of", value));
        let tag = tag.or(request.filter("tag:oven:run").map(|value| ("oven:run", value)));
        let items = self.snapshots.iter().filter(|(id, stored)| {
            stored.owner == owner
                && wanted.is_none_or(|wanted| wanted == *id)
                && tag.is_none_or(|(key, value)| stored.tags.get(key).is_some_and(|tag| tag == value))
        });
        let items = items.map(|(id, stored)| {
            let key =
                stored.key.as_ref().map(|key| format!("<kmsKeyId>{key}</kmsKeyId>")).unwrap_or_default();
            format!(
                "<item><snapshotId>{id}</snapshotId><status>{}</status><volumeSize>{}</volumeSize>\
                 <ownerId>123456789012</ownerId><encrypted>{}</encrypted>{key}</item>",
                stored.state,
                stored.size,
                stored.key.is_some()
            )
        });
        xml(request, &format!("<snapshotSet>{}</snapshotSet>", items.collect::<String>()))
    }

    fn start(&mut self, body: &serde_json::Value) -> Answer {
        let text = |key: &str| body[key].as_str().map(str::to_owned);
        if body.get("ParentSnapshotId").is_some()
            && (body.get("Encrypted").is_some() || body.get("KmsKeyArn").is_some())
        {
            let message = "You cannot specify ParentSnapshotId and Encrypted";
            return refusal(400, "ValidationException", message, "INVALID_PARAMETER_VALUE", true);
        }
        let token = text("ClientToken").unwrap();
        let known = self.snapshots.iter().find(|(_, stored)| stored.token == token).map(|(id, _)| id.clone());
        let tags = body["Tags"].as_array().unwrap().iter();
        let pair = |tag: &serde_json::Value| {
            (tag["Key"].as_str().unwrap().into(), tag["Value"].as_str().unwrap().into())
        };
        let size = body["VolumeSize"].as_u64().unwrap();
        let stored = StoredSnapshot {
            state: "pending",
            owner: "self",
            token,
            size,
            tags: tags.map(pair).collect(),
            ..Default::default()
        };
        let id = known.unwrap_or_else(|| self.insert(stored));
        answer(
            201,
            format!(
                r#"{{"SnapshotId": "{id}", "Status": "pending", "BlockSize": {BLOCK}, "VolumeSize": {size}}}"#
            ),
        )
    }
}

fn list(stored: &StoredSnapshot, request: &Request, (page, empty, age): (usize, usize, u32)) -> Answer {
    // A page token consists of the next index, the number of empty pages that come first, and the token's age.
    let parts: Vec<u32> = request.get("pageToken").split('-').filter_map(|part| part.parse().ok()).collect();
    let (from, vain) = match parts[..] {
        [.., of] if of != age => {
            return refusal(400, "ValidationException", "Invalid page token", "INVALID_PAGE_TOKEN", true);
        }
        [from, vain, _] => (from, vain),
        _ => (request.get("startingBlockIndex").parse().unwrap_or(0), 0),
    };
    let rest: Vec<u32> = stored.blocks.keys().copied().filter(|index| *index >= from).collect();
    let shown = if vain > 0 { &[][..] } else { &rest[..rest.len().min(page)] };
    let next = match shown.last() {
        None if vain > 0 => Some((from, vain - 1)),
        Some(last) if rest.len() > shown.len() => Some((last + 1, empty as u32)),
        _ => None,
    };
    let blocks: Vec<_> = shown
        .iter()
        .map(|index| serde_json::json!({ "BlockIndex": index, "BlockToken": format!("{index}-{age}") }))
        .collect();
    let mut body = serde_json::json!({ "Blocks": blocks, "BlockSize": BLOCK, "VolumeSize": stored.size });
    if let Some((from, vain)) = next {
        body["NextToken"] = format!("{from}-{vain}-{age}").into();
    }
    answer(200, body.to_string())
}

fn get(stored: &StoredSnapshot, request: &Request, age: u32) -> Answer {
    if request.get("blockToken") != format!("{}-{age}", request.index()) {
        return refusal(400, "ValidationException", "Invalid block token", "INVALID_BLOCK_TOKEN", true);
    }
    let data = stored.blocks[&request.index()].clone();
    let headers = vec![
        ("x-amz-Checksum", STANDARD.encode(Sha256::digest(&data))),
        ("x-amz-Checksum-Algorithm", "SHA256".to_owned()),
        ("x-amz-Data-Length", data.len().to_string()),
    ];
    Answer { status: 200, headers, body: data }
}

fn put(stored: &mut StoredSnapshot, request: &Request) -> Answer {
    let checksum = STANDARD.encode(Sha256::digest(&request.body));
    if stored.state != "pending" {
        return refusal(
            400,
            "ValidationException",
            "The snapshot is not pending",
            "INVALID_SNAPSHOT_ID",
            true,
        );
    }
    if request.get("x-amz-checksum") != checksum || request.get("x-amz-data-length") != BLOCK.to_string() {
        return refusal(400, "ValidationException", "bad checksum", "INVALID_PARAMETER_VALUE", true);
    }
    stored.blocks.insert(request.index(), request.body.clone());
    Answer { status: 201, headers: vec![("x-amz-Checksum", checksum)], body: b"{}".to_vec() }
}

fn complete(stored: &mut StoredSnapshot, request: &Request, ends: &'static str) -> Answer {
    if stored.state != "pending" {
        return refusal(
            400,
            "ValidationException",
            "The snapshot is not pending",
            "INVALID_SNAPSHOT_ID",
            true,
        );
    }
    let all = stored.blocks.values().fold(Sha256::new(), |all, data| all.chain_update(Sha256::digest(data)));
    if request.get("x-amz-changedblockscount") != stored.blocks.len().to_string() {
        return refusal(
            400,
            "ValidationException",
            "wrong changed blocks count",
            "INVALID_PARAMETER_VALUE",
            true,
        );
    }
    let linear = request.get("x-amz-checksum-aggregation-method") == "LINEAR";
    if !linear || request.get("x-amz-checksum") != STANDARD.encode(all.finalize()) {
        return refusal(
            400,
            "ValidationException",
            "The checksum does not match",
            "INVALID_PARAMETER_VALUE",
            true,
        );
    }
    stored.state = ends;
    answer(202, r#"{"Status": "pending"}"#)
}

fn request_tags(request: &Request) -> BTreeMap<String, String> {
    let keys = (1..).map_while(|i| {
        let at = |what| request.params.get(&format!("tagspecification.1.tag.{i}.{what}")).cloned();
        at("key").zip(at("value"))
    });
    keys.collect()
}

fn xml(request: &Request, inside: &str) -> Answer {
    let name = format!("{}Response", request.action);
    answer(
        200,
        format!(
            "<{name} xmlns=\"http://ec2.amazonaws.com/doc/2016-11-15/\"><requestId>req-1</requestId>{inside}</{name}>"
        ),
    )
}
