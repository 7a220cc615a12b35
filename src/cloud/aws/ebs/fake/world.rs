//! What a good server does.

use super::{Answer, Kept, Request, World, answer, refusal};
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
                    Some(kept) => match request.action.as_str() {
                        "ListSnapshotBlocks" => list(kept, request, world),
                        "GetSnapshotBlock" => get(kept, request, world.2),
                        "PutSnapshotBlock" => put(kept, request),
                        "CompleteSnapshot" => complete(kept, request, ends),
                        action => panic!("{action}"),
                    },
                }
            }
        }
    }

    fn insert(&mut self, kept: Kept) -> String {
        let id = format!("snap-1{:016}", self.calls.len());
        self.snapshots.insert(id.clone(), kept);
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
        let items = self.snapshots.iter().filter(|(id, kept)| {
            kept.owner == owner
                && wanted.is_none_or(|wanted| wanted == *id)
                && tag.is_none_or(|(key, value)| kept.tags.get(key).is_some_and(|tag| tag == value))
        });
        let items = items.map(|(id, kept)| {
            let key = kept.key.as_ref().map(|key| format!("<kmsKeyId>{key}</kmsKeyId>")).unwrap_or_default();
            format!(
                "<item><snapshotId>{id}</snapshotId><status>{}</status><volumeSize>{}</volumeSize>\
                 <ownerId>123456789012</ownerId><encrypted>{}</encrypted>{key}</item>",
                kept.state,
                kept.size,
                kept.key.is_some()
            )
        });
        xml(request, &format!("<snapshotSet>{}</snapshotSet>", items.collect::<String>()))
    }

    fn start(&mut self, asked: &serde_json::Value) -> Answer {
        let text = |key: &str| asked[key].as_str().map(str::to_owned);
        if asked.get("ParentSnapshotId").is_some()
            && (asked.get("Encrypted").is_some() || asked.get("KmsKeyArn").is_some())
        {
            let message = "You cannot specify ParentSnapshotId and Encrypted";
            return refusal(400, "ValidationException", message, "INVALID_PARAMETER_VALUE", true);
        }
        let token = text("ClientToken").unwrap();
        let known = self.snapshots.iter().find(|(_, kept)| kept.token == token).map(|(id, _)| id.clone());
        let tags = asked["Tags"].as_array().unwrap().iter();
        let pair = |tag: &serde_json::Value| {
            (tag["Key"].as_str().unwrap().into(), tag["Value"].as_str().unwrap().into())
        };
        let size = asked["VolumeSize"].as_u64().unwrap();
        let kept = Kept {
            state: "pending",
            owner: "self",
            token,
            size,
            tags: tags.map(pair).collect(),
            ..Default::default()
        };
        let id = known.unwrap_or_else(|| self.insert(kept));
        answer(
            201,
            format!(
                r#"{{"SnapshotId": "{id}", "Status": "pending", "BlockSize": {BLOCK}, "VolumeSize": {size}}}"#
            ),
        )
    }
}

fn list(kept: &Kept, request: &Request, (page, empty, age): (usize, usize, u32)) -> Answer {
    // A page's token: the next index, how many empty pages come before it, and its age.
    let parts: Vec<u32> = request.get("pageToken").split('-').filter_map(|part| part.parse().ok()).collect();
    let (from, vain) = match parts[..] {
        [.., of] if of != age => {
            return refusal(400, "ValidationException", "Invalid page token", "INVALID_PAGE_TOKEN", true);
        }
        [from, vain, _] => (from, vain),
        _ => (request.get("startingBlockIndex").parse().unwrap_or(0), 0),
    };
    let rest: Vec<u32> = kept.blocks.keys().copied().filter(|index| *index >= from).collect();
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
    let mut body = serde_json::json!({ "Blocks": blocks, "BlockSize": BLOCK, "VolumeSize": kept.size });
    if let Some((from, vain)) = next {
        body["NextToken"] = format!("{from}-{vain}-{age}").into();
    }
    answer(200, body.to_string())
}

fn get(kept: &Kept, request: &Request, age: u32) -> Answer {
    if request.get("blockToken") != format!("{}-{age}", request.index()) {
        return refusal(400, "ValidationException", "Invalid block token", "INVALID_BLOCK_TOKEN", true);
    }
    let data = kept.blocks[&request.index()].clone();
    let headers = vec![
        ("x-amz-Checksum", STANDARD.encode(Sha256::digest(&data))),
        ("x-amz-Checksum-Algorithm", "SHA256".to_owned()),
        ("x-amz-Data-Length", data.len().to_string()),
    ];
    Answer { status: 200, headers, body: data }
}

fn put(kept: &mut Kept, request: &Request) -> Answer {
    let checksum = STANDARD.encode(Sha256::digest(&request.body));
    if kept.state != "pending" {
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
    kept.blocks.insert(request.index(), request.body.clone());
    Answer { status: 201, headers: vec![("x-amz-Checksum", checksum)], body: b"{}".to_vec() }
}

fn complete(kept: &mut Kept, request: &Request, ends: &'static str) -> Answer {
    if kept.state != "pending" {
        return refusal(
            400,
            "ValidationException",
            "The snapshot is not pending",
            "INVALID_SNAPSHOT_ID",
            true,
        );
    }
    let all = kept.blocks.values().fold(Sha256::new(), |all, data| all.chain_update(Sha256::digest(data)));
    if request.get("x-amz-changedblockscount") != kept.blocks.len().to_string() {
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
    kept.state = ends;
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
