//! Assigns spans to lanes. A span is put on its parent's lane if the parent is the innermost open span of that lane.
//! Otherwise the span is put on the first free lane of its kind.

use super::Lane;
use serde_json::{Map, Value};
use std::time::Duration;

#[derive(Default)]
pub struct Lanes {
    lanes: Vec<LaneSpans>,
    next: u64,
}

struct LaneSpans {
    pid: u32,
    lane: Lane,
    tid: u32,
    /// Open spans, the outermost first.
    open: Vec<OpenSpan>,
}

struct OpenSpan {
    id: u64,
    name: String,
    began: Duration,
}

/// A span that has ended.
pub struct EndedSpan {
    pub pid: u32,
    pub tid: u32,
    pub name: String,
    pub began: Duration,
    pub args: Map<String, Value>,
}

impl Lanes {
    /// Begins a span. Returns its id. If the span is on a new lane, also returns the lane's number and name.
    pub fn begin(
        &mut self,
        pid: u32,
        lane: Lane,
        parent: Option<u64>,
        name: &str,
        now: Duration,
    ) -> (u64, Option<(u32, String)>) {
        let id = self.next;
        self.next += 1;
        let open = OpenSpan { id, name: name.to_owned(), began: now };
        let inside = |one: &LaneSpans| parent.is_some() && one.open.last().map(|open| open.id) == parent;
        let free = |one: &LaneSpans| one.pid == pid && one.lane == lane && one.open.is_empty();
        let found = self.lanes.iter().position(inside).or_else(|| self.lanes.iter().position(free));
        if let Some(found) = found {
            self.lanes[found].open.push(open);
            return (id, None);
        }
        let before = self.lanes.iter().filter(|one| one.pid == pid && one.lane == lane).count() as u32;
        // Viewers sort the lanes by these numbers. Each kind of lane has its own range of 1000 numbers, so lanes of the
        // same kind are adjacent. A track has fewer than 1000 lanes of a kind.
        let tid = lane as u32 * 1000 + before + 1;
        self.lanes.push(LaneSpans { pid, lane, tid, open: vec![open] });
        let name =
            if before == 0 { lane.name().to_owned() } else { format!("{} {}", lane.name(), before + 1) };
        (id, Some((tid, name)))
    }

    /// Ends a span and the spans inside of it, and returns them. Returns an empty list if the span has already ended.
    pub fn end(&mut self, id: u64, args: Map<String, Value>) -> Vec<EndedSpan> {
        let place = |one: &LaneSpans| one.open.iter().position(|open| open.id == id);
        let found = self.lanes.iter().enumerate().find_map(|(index, one)| Some((index, place(one)?)));
        let Some((index, at)) = found else { return Vec::new() };
        let one = &mut self.lanes[index];
        let (pid, tid) = (one.pid, one.tid);
        let mut args = Some(args);
        let ended = one.open.drain(at..).map(|OpenSpan { id: of, name, began }| {
            let args = if of == id { args.take().unwrap_or_default() } else { unfinished() };
            EndedSpan { pid, tid, name, began, args }
        });
        ended.collect()
    }

    /// Ends all open spans.
    pub fn end_all(&mut self) -> Vec<EndedSpan> {
        let mut all = Vec::new();
        for one in &mut self.lanes {
            let (pid, tid) = (one.pid, one.tid);
            all.extend(one.open.drain(..).map(|OpenSpan { name, began, .. }| EndedSpan {
                pid,
                tid,
                name,
                began,
                args: unfinished(),
            }));
        }
        all
    }
}

fn unfinished() -> Map<String, Value> {
    [("unfinished".to_owned(), Value::Bool(true))].into_iter().collect()
}
