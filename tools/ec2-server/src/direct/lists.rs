//! ListSnapshotBlocks and ListChangedBlocks, with pages.

use super::request::Members;
use super::{Ask, Told, id_of, invalid, known, look_for, readable, tokens};
use crate::actions::Ctx;
use crate::options::Direct;
use crate::refusal::Result;
use crate::world::{Time, World, now};
use oven::cloud::block_api::BlockIndexes;
use oven::ids::BLOCK;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::time::Duration;

/// The maximum number of blocks on a page, unless `MaxResults` is smaller.
const MOST: u32 = 10_000;

/// A page: its first block, its number, and the maximum number of blocks on it.
struct Page {
    query: String,
    start: u32,
    number: u32,
    most: usize,
}

fn after(time: Duration) -> Time {
    now().saturating_add(time.as_millis() as Time)
}

impl Page {
    fn take(members: &Members, query: String, direct: &Direct) -> Result<Self> {
        let most = members.number("MaxResults", 100, MOST)?.unwrap_or(MOST) as usize;
        let start = members.number("StartingBlockIndex", 0, i32::MAX as u32)?.unwrap_or(0);
        let (start, number) = match members.get("NextToken") {
            None => (start, 0),
            Some(token) => tokens::of_page(token, &query, now())
                .ok_or_else(|| invalid("INVALID_PAGE_TOKEN", "The page token is invalid or has expired."))?,
        };
        Ok(Self { query, start, number, most: most.min(direct.page.unwrap_or(most)).max(1) })
    }

    /// Returns the blocks on this page, and the token of the next page.
    fn cut(&self, all: &BlockIndexes, direct: &Direct) -> (Vec<u32>, Option<String>) {
        let empty = direct.empty_pages > 0 && self.number.is_multiple_of(direct.empty_pages + 1);
        let most = if empty { 0 } else { self.most };
        let mut rest = all.range(self.start..);
        let here: Vec<u32> = rest.by_ref().take(most).collect();
        let until = after(direct.page_tokens);
        let next = rest.next().map(|next| tokens::page(&self.query, next, self.number + 1, until));
        (here, next)
    }
}

fn told(size: u32, name: &str, blocks: Vec<Value>, until: Time, next: Option<String>) -> Told {
    let mut value = json!({"VolumeSize": size, "BlockSize": BLOCK, "ExpiryTime": until as f64 / 1000.0});
    value[name] = blocks.into();
    if let Some(next) = next {
        value["NextToken"] = next.into();
    }
    Told::json(200, &value)
}

pub async fn all(ctx: &Ctx, ask: Ask) -> Result<Told> {
    let id = id_of(&ask.members, "SnapshotId")?;
    look_for(ctx, &id.0).await?;
    let size = readable(ctx, &ask, &id.0)?;
    let direct = ctx.state().options.direct;
    let page = Page::take(&ask.members, format!("blocks of {id}"), &direct)?;
    let blocks = known::blocks(ctx, &id).await?;
    let (here, next) = page.cut(&blocks, &direct);
    let until = after(direct.block_tokens);
    let token = |index| json!({"BlockIndex": index, "BlockToken": tokens::block(&id.0, index, until)});
    Ok(told(size, "Blocks", here.into_iter().map(token).collect(), until, next))
}

pub async fn changed(ctx: &Ctx, ask: Ask) -> Result<Told> {
    let second = id_of(&ask.members, "SecondSnapshotId")?;
    let first =
        ask.members.get("FirstSnapshotId").map(|_| id_of(&ask.members, "FirstSnapshotId")).transpose()?;
    for id in first.iter().chain([&second]) {
        look_for(ctx, &id.0).await?;
    }
    let size = readable(ctx, &ask, &second.0)?;
    let direct = ctx.state().options.direct;
    if let Some(first) = &first {
        readable(ctx, &ask, &first.0)?;
        let strangers = {
            let state = ctx.state();
            line(&state.world, &first.0).is_disjoint(&line(&state.world, &second.0))
        };
        if strangers {
            let text = format!("The snapshots {first} and {second} are of different lineages.");
            return Err(invalid("UNRELATED_SNAPSHOTS", text));
        }
    }
    let query = format!("changed {} {second}", first.as_ref().map_or("", |first| &first.0));
    let page = Page::take(&ask.members, query, &direct)?;
    let of_second = known::blocks(ctx, &second).await?;
    let of_first = match &first {
        Some(first) => known::blocks(ctx, first).await?,
        None => Default::default(),
    };
    let blocks = match &first {
        Some(first) => known::changed(ctx, first, &second).await?,
        None => of_second.clone(),
    };
    let (here, next) = page.cut(&blocks, &direct);
    let until = after(direct.block_tokens);
    let one = |index: u32| {
        let mut value = json!({"BlockIndex": index});
        if let Some(first) = first.as_ref().filter(|_| of_first.contains(index)) {
            value["FirstBlockToken"] = tokens::block(&first.0, index, until).into();
        }
        if of_second.contains(index) {
            value["SecondBlockToken"] = tokens::block(&second.0, index, until).into();
        }
        value
    };
    Ok(told(size, "ChangedBlocks", here.into_iter().map(one).collect(), until, next))
}

/// Returns a snapshot and its ancestors: parents, volumes, and the snapshots of these volumes.
fn line(world: &World, id: &str) -> BTreeSet<String> {
    let (mut line, mut at) = (BTreeSet::new(), Some(id.to_owned()));
    while let Some(id) = at.filter(|id| !line.contains(id)) {
        at = world.snapshots.get(&id).and_then(|snapshot| match &snapshot.written {
            Some(written) => written.parent.clone(),
            None => world.volumes.get(&snapshot.volume).map(|volume| volume.snapshot.clone()),
        });
        line.insert(id);
    }
    line
}
