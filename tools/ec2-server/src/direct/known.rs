//! Cached data about complete snapshots, which never change: their blocks, and readers for them.

use super::of_region;
use crate::actions::Ctx;
use crate::refusal::Result;
use oven::cloud::block_api;
use oven::cloud::block_api::{BlockApi as _, SnapshotReader};
use oven::ids::SnapshotId;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

type Indexes = Rc<block_api::BlockIndexes>;

#[derive(Default)]
pub struct Known {
    blocks: RefCell<BTreeMap<String, Indexes>>,
    readers: RefCell<BTreeMap<String, Arc<dyn SnapshotReader>>>,
    /// The blocks that differ between two snapshots.
    changed: RefCell<BTreeMap<(String, String), Indexes>>,
}

impl Known {
    /// Forgets a deleted snapshot.
    pub fn forget(&self, id: &str) {
        self.blocks.borrow_mut().remove(id);
        self.readers.borrow_mut().remove(id);
        self.changed.borrow_mut().retain(|(first, second), _| first != id && second != id);
    }
}

pub async fn blocks(ctx: &Ctx, id: &SnapshotId) -> Result<Indexes> {
    if let Some(known) = ctx.known.blocks.borrow().get(&id.0) {
        return Ok(known.clone());
    }
    let found = Rc::new(ctx.region.contents(id).await.map_err(of_region)?.blocks);
    ctx.known.blocks.borrow_mut().insert(id.0.clone(), found.clone());
    Ok(found)
}

pub async fn reader(ctx: &Ctx, id: &SnapshotId) -> Result<Arc<dyn SnapshotReader>> {
    if let Some(known) = ctx.known.readers.borrow().get(&id.0) {
        return Ok(known.clone());
    }
    let reader = ctx.region.reader(id).await.map_err(of_region)?;
    ctx.known.readers.borrow_mut().insert(id.0.clone(), reader.clone());
    Ok(reader)
}

/// Returns the blocks that differ between two snapshots.
pub async fn changed(ctx: &Ctx, first: &SnapshotId, second: &SnapshotId) -> Result<Indexes> {
    let key = (first.0.clone(), second.0.clone());
    if let Some(known) = ctx.known.changed.borrow().get(&key) {
        return Ok(known.clone());
    }
    let (of_first, of_second) = (blocks(ctx, first).await?, blocks(ctx, second).await?);
    let (mut found, both) = (&*of_first ^ &*of_second, &*of_first & &*of_second);
    let (first, second) = (reader(ctx, first).await?, reader(ctx, second).await?);
    let compare = move || -> anyhow::Result<Vec<u32>> {
        let mut differ = Vec::new();
        for index in both {
            if first.read(index)?.1 != second.read(index)?.1 {
                differ.push(index);
            }
        }
        Ok(differ)
    };
    let compared = tokio::task::spawn_blocking(compare).await;
    found.extend(compared.unwrap_or_else(|panic| Err(panic.into())).map_err(of_region)?);
    let found = Rc::new(found);
    ctx.known.changed.borrow_mut().insert(key, found.clone());
    Ok(found)
}
