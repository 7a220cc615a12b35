//! A list of the resources, for tests.

use crate::world::{Tags, Time, World};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A resource.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub id: String,
    pub state: String,
    pub tags: Tags,
    /// The name of an image; empty for other resources.
    pub name: String,
    /// The id of a volume's snapshot, of a snapshot's volume, or of an image's root snapshot.
    pub of: String,
    /// The file with the data of a volume or a snapshot.
    pub data: Option<PathBuf>,
    /// Whether the resource exists without a call that created it.
    pub seeded: bool,
}

/// All resources, sorted by id. Deleted resources are omitted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    pub volumes: Vec<Entry>,
    pub snapshots: Vec<Entry>,
    pub images: Vec<Entry>,
}

impl Ledger {
    pub(crate) fn of(world: &World, dir: &Path, now: Time) -> Self {
        let file = |kind: &str, id: &str| Some(dir.join(kind).join(format!("{id}.img")));
        let mut ledger = Self::default();
        for volume in world.volumes.values().filter(|v| !v.common.is_gone(now)) {
            ledger.volumes.push(Entry {
                id: volume.common.id.clone(),
                state: volume.state(now).to_owned(),
                tags: volume.common.tags.clone(),
                name: String::new(),
                of: volume.snapshot.clone(),
                data: file("volumes", &volume.common.id),
                seeded: volume.common.seeded,
            });
        }
        for snapshot in world.snapshots.values().filter(|s| !s.common.is_gone(now)) {
            ledger.snapshots.push(Entry {
                id: snapshot.common.id.clone(),
                state: snapshot.state(now).to_owned(),
                tags: snapshot.common.tags.clone(),
                name: String::new(),
                of: snapshot.volume.clone(),
                data: file("snapshots", &snapshot.common.id),
                seeded: snapshot.common.seeded,
            });
        }
        for image in world.images.values().filter(|i| !i.common.is_gone(now)) {
            ledger.images.push(Entry {
                id: image.common.id.clone(),
                state: image.state(now).to_owned(),
                tags: image.common.tags.clone(),
                name: image.name.clone(),
                of: image.root_snapshot().unwrap_or_default().to_owned(),
                data: None,
                seeded: image.common.seeded,
            });
        }
        ledger
    }

    /// Returns the resources that were created by calls.
    pub fn made(&self) -> Self {
        let made = |all: &[Entry]| all.iter().filter(|e| !e.seeded).cloned().collect();
        Self { volumes: made(&self.volumes), snapshots: made(&self.snapshots), images: made(&self.images) }
    }
}
