//! GetSnapshotBlock and PutSnapshotBlock.

use super::{
    Ask, Told, blocks_of, decoded, encoded, id_of, invalid, known, look_for, of_region, permitted_snapshot,
    readable, tokens,
};
use crate::actions::Ctx;
use crate::refusal::Result;
use crate::world::now;
use oven::cloud::block_api::BlockApi as _;
use oven::ids::{BLOCK, Digest};
use std::sync::Arc;

/// Returns the headers that describe a block.
fn of_block(digest: &Digest) -> Vec<(&'static str, String)> {
    vec![("x-amz-Checksum", encoded(digest)), ("x-amz-Checksum-Algorithm", "SHA256".to_owned())]
}

pub async fn get(ctx: &Ctx, ask: Ask) -> Result<Told> {
    let (id, index) = (id_of(&ask.members, "SnapshotId")?, ask.members.index()?);
    let token = ask.members.required("BlockToken")?;
    look_for(ctx, &id.0).await?;
    let size = readable(ctx, &ask, &id.0)?;
    if !tokens::is_of_block(token, &id.0, index, now()) {
        return Err(invalid("INVALID_BLOCK_TOKEN", "The block token is invalid or has expired."));
    }
    if index >= blocks_of(size) {
        return Err(invalid(
            "INVALID_BLOCK",
            format!("Block {index} is beyond the {size} GiB of the snapshot."),
        ));
    }
    let reader = known::reader(ctx, &id).await?;
    let read = tokio::task::spawn_blocking(move || reader.read(index)).await;
    let (mut body, digest) = read.unwrap_or_else(|panic| Err(panic.into())).map_err(of_region)?;
    if ask.flipped {
        let at = index as usize % body.len();
        body[at] ^= 1;
    }
    let mut headers = of_block(&digest);
    headers.push(("x-amz-Data-Length", body.len().to_string()));
    Ok(Told { status: 200, headers, kind: "application/octet-stream", body, made: None })
}

pub async fn put(ctx: &Ctx, ask: Ask) -> Result<Told> {
    let m = &ask.members;
    let (id, index) = (id_of(m, "SnapshotId")?, m.index()?);
    let (length, checksum) = (m.required("DataLength")?, m.required("Checksum")?);
    m.required("ChecksumAlgorithm")?;
    m.is_only("ChecksumAlgorithm", "SHA256")?;
    m.is_only("DataLength", &BLOCK.to_string())?;
    m.number("Progress", 0, 100)?;
    let wrong = |text: &str| invalid("INVALID_PARAMETER_VALUE", text);
    if ask.body.len().to_string() != length {
        return Err(wrong("Failed to read block data"));
    }
    let digest = decoded(checksum).ok_or_else(|| wrong("The checksum is no SHA256 in base64."))?;
    look_for(ctx, &id.0).await?;
    {
        let mut state = ctx.state();
        let now = now();
        let snapshot = permitted_snapshot(&state, &state.world, &ask, &id.0)?;
        writable(snapshot, &state.options.account, now)?;
        let size = snapshot.size;
        if index >= blocks_of(size) {
            let text = format!("Block {index} is beyond the {size} GiB of the snapshot.");
            return Err(invalid("INVALID_BLOCK", text));
        }
        touch(&mut state, &id.0);
    }
    // `put` compares the data with the checksum, in another thread.
    ctx.region.put(&id, index, Arc::from(ask.body), digest).await.map_err(of_region)?;
    touch(&mut ctx.state(), &id.0);
    Ok(Told {
        status: 201,
        headers: of_block(&digest),
        kind: "application/json",
        body: Vec::new(),
        made: None,
    })
}

/// Fails if blocks cannot be written to this snapshot.
pub fn writable(snapshot: &crate::world::Snapshot, account: &str, now: u64) -> Result<()> {
    let id = &snapshot.common.id;
    if snapshot.common.owner != account {
        let text = "Only the owner of a snapshot writes to it.";
        return Err(crate::refusal::refuse("AccessDeniedException:UNAUTHORIZED_ACCOUNT", text));
    }
    let sealed = snapshot.written.as_ref().is_none_or(|written| written.sealed.is_some());
    match snapshot.state(now) {
        "pending" if !sealed => Ok(()),
        "pending" => Err(invalid("INVALID_SNAPSHOT_ID", format!("The snapshot '{id}' is being completed."))),
        other => {
            let text = format!("The snapshot '{id}' is in the '{other}' state, and not pending.");
            Err(invalid("INVALID_SNAPSHOT_ID", text))
        }
    }
}

/// Records the time of the last call. This does not count as a change for stale reads, because there are thousands of
/// such calls.
fn touch(state: &mut crate::state::State, id: &str) {
    let written = state.world.snapshots.get_mut(id).and_then(|snapshot| snapshot.written.as_mut());
    if let Some(written) = written {
        written.touched = now();
    }
}
