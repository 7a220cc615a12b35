//! `.ami_id.json` beside a definition: where GumGum's CI users look for the id.

use crate::ids::ImageId;
use crate::report::Report;
use anyhow::{Context, Result};
use serde_json::json;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Hidden, so that it does not count in the checksum.
const NAME: &str = ".ami_id.json";

/// Says the id of the definition's image. Without one the file goes: after a failed bake nobody shall take an older
/// image for this one. The image is what matters, so that a failure here is a warning.
pub fn keep(dir: &Path, id: Option<&ImageId>, report: &Report) {
    let kept = match id {
        Some(id) => write(dir, id),
        None => remove(dir),
    };
    if let Err(error) = kept {
        report.warn(format!("{error:#}"));
    }
}

/// Written beside and renamed, so that a reader never sees half of it.
fn write(dir: &Path, id: &ImageId) -> Result<()> {
    let path = dir.join(NAME);
    // To the letter as GumGum's tool spells it: somebody may read it with less than a JSON parser.
    let content = format!("{{\"ami_id\": {}}}\n", json!(id));
    // Only what may be ours: a FIFO of that name would keep us waiting for ever.
    let may_be = path.symlink_metadata().is_ok_and(|m| m.is_file() && m.len() == content.len() as u64);
    if may_be && std::fs::read_to_string(&path).is_ok_and(|old| old == content) {
        return Ok(());
    }
    let write = || -> Result<()> {
        let readable = std::fs::Permissions::from_mode(0o644);
        let mut file = tempfile::Builder::new().prefix(".ami_id.").permissions(readable).tempfile_in(dir)?;
        file.write_all(content.as_bytes())?;
        file.persist(&path)?;
        Ok(())
    };
    write().with_context(|| format!("writing {}", path.display()))
}

fn remove(dir: &Path) -> Result<()> {
    let path = dir.join(NAME);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}, which names an older image", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_names_the_image_or_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let (id, report) = (ImageId("ami-1".into()), Report::silent());
        keep(dir.path(), None, &report);
        keep(dir.path(), Some(&id), &report);
        assert_eq!(std::fs::read_to_string(dir.path().join(NAME)).unwrap(), "{\"ami_id\": \"ami-1\"}\n");
        keep(dir.path(), None, &report);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
