//! StartSnapshot and CompleteSnapshot.

use super::blocks::writable;
use super::request::Members;
use super::{Ask, Told, decoded, encoded, id_of, invalid, look_for, of_region, permitted_snapshot, usable};
use crate::actions::{Ctx, tags};
use crate::faults::Turn;
use crate::iam::{Target, permitted};
use crate::refusal::{Refusal, Result, refuse};
use crate::state::State;
use crate::world::{NEVER, Snapshot, Tags, Time, Token, Written, now};
use oven::cloud::block_api::{BlockApi as _, NewSnapshot};
use oven::ids::{BLOCK, Digest};
use oven::ids::{RunId, SnapshotId};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// The volume id of a snapshot that was not created from a volume.
pub const NO_VOLUME: &str = "vol-ffffffff";

fn wrong(text: impl std::fmt::Display) -> Refusal {
    invalid("INVALID_PARAMETER_VALUE", text)
}

/// The parsed members of StartSnapshot.
struct Wanted {
    size: u32,
    parent: Option<SnapshotId>,
    description: String,
    tags: Tags,
    encrypted: bool,
    key: Option<String>,
    timeout: Duration,
    token: Option<String>,
}

fn wanted(m: &Members) -> Result<Wanted> {
    m.required("VolumeSize")?;
    let size = m.number("VolumeSize", 1, 65536).map_err(|r| invalid("INVALID_VOLUME_SIZE", r.message))?;
    let parent = m.get("ParentSnapshotId").map(|_| id_of(m, "ParentSnapshotId")).transpose()?;
    let encrypted = match m.get("Encrypted") {
        None => None,
        Some("true") => Some(true),
        Some("false") => Some(false),
        Some(other) => return Err(wrong(format!("Encrypted is {other}, and no boolean."))),
    };
    let key = m.get("KmsKeyArn").map(str::to_owned);
    if parent.is_some() && (encrypted.is_some() || key.is_some()) {
        return Err(wrong("Encrypted and KmsKeyArn cannot be given with ParentSnapshotId."));
    }
    if key.is_some() && encrypted != Some(true) {
        return Err(wrong("KmsKeyArn is given, and Encrypted is not true."));
    }
    if let Some(key) = key.as_ref().filter(|key| !(key.starts_with("arn:aws") && key.contains(":key/"))) {
        return Err(invalid("INVALID_CUSTOMER_KEY", format!("'{key}' is no ARN of a KMS key.")));
    }
    let description = m.get("Description").unwrap_or_default().to_owned();
    if m.get("Description") == Some("") || description.chars().count() > 255 {
        return Err(wrong("Description has 1 to 255 characters."));
    }
    let token = m.get("ClientToken").map(str::to_owned);
    let bad = |token: &str| token.is_empty() || token.len() > 255 || token.contains(char::is_whitespace);
    if token.as_deref().is_some_and(bad) {
        return Err(wrong("ClientToken has 1 to 255 characters, and no spaces."));
    }
    let minutes = m.number("Timeout", 10, 4320)?.unwrap_or(60);
    Ok(Wanted {
        size: size.unwrap_or_default(),
        parent,
        description,
        tags: tags_of(m)?,
        encrypted: encrypted == Some(true),
        key,
        timeout: Duration::from_secs(60 * u64::from(minutes)),
        token,
    })
}

fn tags_of(m: &Members) -> Result<Tags> {
    let bad = |text: &str| invalid("INVALID_TAG", text);
    let mut found = Tags::new();
    let Some(text) = m.get("Tags") else { return Ok(found) };
    let listed: Vec<BTreeMap<String, String>> =
        serde_json::from_str(text).map_err(|_| bad("Tags is no list of keys and values."))?;
    for mut tag in listed {
        let (key, value) = (tag.remove("Key"), tag.remove("Value"));
        let Some(key) = key.filter(|key| !key.is_empty() && tag.is_empty()) else {
            return Err(bad("A tag has a key and a value."));
        };
        let value = value.unwrap_or_default();
        if key.chars().count() > 127 || value.chars().count() > 255 {
            return Err(bad("A key has at most 127 characters, and a value 255."));
        }
        if found.insert(key, value).is_some() {
            return Err(bad("A key is given twice."));
        }
    }
    tags::check(&found).map_err(|refusal| bad(&refusal.message))?;
    Ok(found)
}

pub async fn start(ctx: &Rc<Ctx>, ask: Ask) -> Result<Told> {
    let mut wanted = wanted(&ask.members)?;
    // Only one call runs at a time, so that concurrent calls with the same token create one snapshot.
    let _one = ctx.changing.lock().await;
    if let Some(parent) = &wanted.parent {
        look_for(ctx, &parent.0).await?;
    }
    let token = wanted.token.as_ref().map(|token| format!("ebs:{token}"));
    let timeout = {
        let state = ctx.state();
        let none = Tags::new();
        let mut targets = vec![Target::made("snapshot", &wanted.tags)];
        if let Some(id) = &wanted.parent {
            let parent = state.world.snapshots.get(&id.0);
            targets.push(Target::new(&id.0, parent.map_or(&none, |s| &s.common.tags)));
        }
        permitted(&state.options, "ebs:StartSnapshot", &targets)?;
        drop(targets);
        if let Some(used) = token.as_ref().and_then(|token| state.world.tokens.get(token)) {
            return match state.world.snapshots.get(&used.id) {
                Some(snapshot) if used.params == *ask.members.fields() => Ok(told(snapshot)),
                _ => {
                    let text = "The client token was used for another request.";
                    Err(refuse("ConflictException", text))
                }
            };
        }
        check(&state, &mut wanted)?;
        let direct = &state.options.direct;
        if direct.timeout.is_zero() { wanted.timeout } else { direct.timeout }
    };
    let spec = NewSnapshot {
        parent: wanted.parent.clone(),
        size_gib: u64::from(wanted.size),
        description: wanted.description.clone(),
        run: RunId("ec2-server".to_owned()),
        tags: Tags::new(),
        encrypted: false,
        kms_key: None,
    };
    // This server gives up the snapshot after the timeout. The region does so only if the server has ended.
    let region = ctx.region.with_write_timeout(timeout + Duration::from_secs(3600));
    let id = region.start(&spec).await.map_err(of_region)?.0;
    let told = {
        let mut state = ctx.state();
        let mut common = state.common(&id, wanted.tags, Duration::ZERO, ask.turn);
        if ask.turn != Some(Turn::Vanishes) {
            common.ready_at = NEVER;
        }
        let snapshot = Snapshot {
            common,
            volume: NO_VOLUME.to_owned(),
            size: wanted.size,
            description: wanted.description,
            encrypted: wanted.encrypted,
            key: wanted.key,
            written: Some(Written {
                parent: wanted.parent.map(|parent| parent.0),
                timeout: timeout.as_millis() as Time,
                touched: now(),
                sealed: None,
            }),
            ..Snapshot::default()
        };
        let told = told(&snapshot);
        state.change(|world| {
            if let Some(token) = token {
                world.tokens.insert(token, Token { params: ask.members.fields().clone(), id: id.clone() });
            }
            world.snapshots.insert(id, snapshot);
        });
        told
    };
    ctx.save();
    Ok(told)
}

/// Checks the request against the existing snapshots, and completes it with data of its parent.
fn check(state: &State, wanted: &mut Wanted) -> Result<()> {
    let (options, now) = (&state.options, now());
    let written = |s: &&Snapshot| {
        !s.common.is_gone(now)
            && s.state(now) == "pending"
            && s.written.as_ref().is_some_and(|written| written.sealed.is_none())
    };
    if state.world.snapshots.values().filter(written).count() >= options.direct.pending {
        let text = "The limit of snapshots that are being written is reached.";
        return Err(refuse("ConcurrentLimitExceededException", text));
    }
    if let Some(id) = &wanted.parent {
        let parent = usable(state, &state.world, &id.0)?;
        if parent.state(now) != "completed" {
            let text = format!("The parent snapshot '{id}' is in the '{}' state.", parent.state(now));
            return Err(invalid("INVALID_SNAPSHOT_ID", text));
        }
        if wanted.size < parent.size {
            let text = format!(
                "The volume size of {} GiB is smaller than the {} GiB of the parent.",
                wanted.size, parent.size
            );
            return Err(invalid("INVALID_VOLUME_SIZE", text));
        }
        if options.direct.encrypts && !parent.encrypted {
            let text = "Encryption by default is enabled: the parent snapshot is not encrypted.";
            return Err(invalid("INVALID_SNAPSHOT_ID", text));
        }
        (wanted.encrypted, wanted.key) = (parent.encrypted, parent.key.clone());
    } else if wanted.encrypted || options.direct.encrypts {
        wanted.encrypted = true;
        if !options.may_use_key(wanted.key.as_deref()) {
            let text = "You do not have sufficient access to the KMS key.";
            return Err(refuse("AccessDeniedException:DEPENDENCY_ACCESS_DENIED", text));
        }
        wanted.key.get_or_insert_with(|| options.default_key());
    }
    Ok(())
}

fn told(snapshot: &Snapshot) -> Told {
    let common = &snapshot.common;
    let mut value = json!({
        "SnapshotId": common.id, "OwnerId": common.owner, "Status": snapshot.state(now()),
        "StartTime": common.created as f64 / 1000.0, "VolumeSize": snapshot.size, "BlockSize": BLOCK,
    });
    if !common.tags.is_empty() {
        let tags = common.tags.iter().map(|(key, value)| json!({"Key": key, "Value": value}));
        value["Tags"] = tags.collect::<Vec<Value>>().into();
    }
    if !snapshot.description.is_empty() {
        value["Description"] = snapshot.description.clone().into();
    }
    if let Some(parent) = snapshot.written.as_ref().and_then(|written| written.parent.clone()) {
        value["ParentSnapshotId"] = parent.into();
    }
    if let Some(key) = &snapshot.key {
        value["KmsKeyArn"] = key.clone().into();
    }
    Told { made: Some(common.id.clone()), ..Told::json(201, &value) }
}

/// Returns the SHA-256 of the blocks' digests, in the order of their indexes.
fn linear(blocks: &BTreeMap<u32, Digest>) -> Digest {
    let mut hash = Sha256::new();
    blocks.values().for_each(|digest| hash.update(digest));
    hash.finalize().into()
}

pub async fn complete(ctx: &Rc<Ctx>, ask: Ask) -> Result<Told> {
    let m = &ask.members;
    let id = id_of(m, "SnapshotId")?;
    m.required("ChangedBlocksCount")?;
    let count = m.number("ChangedBlocksCount", 0, i32::MAX as u32)?.unwrap_or_default();
    m.is_only("ChecksumAlgorithm", "SHA256")?;
    m.is_only("ChecksumAggregationMethod", "LINEAR")?;
    let checksum = match m.get("Checksum") {
        None => None,
        Some(_) if m.get("ChecksumAlgorithm").is_none() || m.get("ChecksumAggregationMethod").is_none() => {
            return Err(wrong("A checksum needs its algorithm and its aggregation method."));
        }
        Some(text) => Some(decoded(text).ok_or_else(|| wrong("The checksum is no SHA256 in base64."))?),
    };
    let _one = ctx.changing.lock().await;
    look_for(ctx, &id.0).await?;
    let pending = Told::json(202, &json!({"Status": "pending"}));
    {
        let state = ctx.state();
        let snapshot = permitted_snapshot(&state, &state.world, &ask, &id.0)?;
        let sealed = snapshot.written.as_ref().and_then(|written| written.sealed.as_ref());
        let same = sealed.is_some_and(|(blocks, is)| {
            *blocks == count && checksum.as_ref().is_none_or(|checksum| encoded(checksum) == *is)
        });
        // The call is repeated while the snapshot is being completed.
        if same && snapshot.state(now()) == "pending" {
            return Ok(pending);
        }
        writable(snapshot, &state.options.account, now())?;
    }
    let put = ctx.region.put_blocks(&id).map_err(of_region)?;
    if put.len() != count as usize {
        let text = format!("ChangedBlocksCount is {count}, and {} blocks were written.", put.len());
        return Err(wrong(text));
    }
    let is = linear(&put);
    if checksum.is_some_and(|checksum| checksum != is) {
        return Err(wrong("The checksum is not the one of the blocks that were written."));
    }
    let ready_at = {
        let mut state = ctx.state();
        let delay = state.options.delays.completing;
        let ready_at = now() + state.drawn(delay);
        state.change(|world| {
            if let Some(snapshot) = world.snapshots.get_mut(&id.0) {
                snapshot.common.turn = ask.turn.or(snapshot.common.turn);
                if let Some(written) = &mut snapshot.written {
                    written.sealed = Some((count, encoded(&is)));
                }
            }
        });
        ready_at
    };
    ctx.save();
    finish(ctx, id, count, is, ready_at);
    Ok(pending)
}

/// Completes a snapshot in the region in the background. Here it is complete at `ready_at` or later.
fn finish(ctx: &Rc<Ctx>, id: SnapshotId, count: u32, checksum: Digest, ready_at: Time) {
    let ctx = ctx.clone();
    tokio::task::spawn_local(async move {
        let done = ctx.region.complete(&id, count, checksum).await;
        {
            let mut state = ctx.state();
            let Some(snapshot) = state.world.snapshots.get_mut(&id.0) else { return };
            snapshot.common.ready_at = ready_at.max(now());
            if let (Err(error), false) = (done, snapshot.common.is_gone(now())) {
                eprintln!("oven-ec2-server: {error:#}");
                snapshot.common.turn = Some(Turn::Failed);
            }
        }
        ctx.save();
    });
}

/// Continues the completions that the last server on this directory did not finish.
pub fn resume(ctx: &Rc<Ctx>) {
    let now = now();
    let open: Vec<(String, u32, String)> = {
        let state = ctx.state();
        let all =
            state.world.snapshots.values().filter(|s| s.common.ready_at == NEVER && !s.common.is_gone(now));
        let sealed = |s: &Snapshot| {
            let (count, checksum) = s.written.as_ref()?.sealed.clone()?;
            Some((s.common.id.clone(), count, checksum))
        };
        all.filter(|s| s.common.turn != Some(Turn::Stuck)).filter_map(sealed).collect()
    };
    for (id, count, checksum) in open {
        let Some(checksum) = decoded(&checksum) else { continue };
        finish(ctx, SnapshotId(id), count, checksum, now);
    }
}

/// Copies a snapshot's data to a new snapshot of the region. Returns its id.
pub async fn copied(ctx: &Ctx, source: &str, size: u32) -> Result<String> {
    let spec = NewSnapshot {
        parent: Some(SnapshotId(source.to_owned())),
        size_gib: u64::from(size),
        description: String::new(),
        run: RunId("ec2-server".to_owned()),
        tags: Tags::new(),
        encrypted: false,
        kms_key: None,
    };
    let id = ctx.region.start(&spec).await.map_err(of_region)?;
    ctx.region.complete(&id, 0, linear(&BTreeMap::new())).await.map_err(of_region)?;
    Ok(id.0)
}
