//! Writes `.ami_id.json` into a definition's directory. CI jobs that were written for GumGum's AMI Bakery read the
//! image's id from this file.

use crate::ids::ImageId;
use crate::report::Report;
use anyhow::{Context, Result};
use serde_json::json;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// The name begins with a dot, so the checksum ignores the file.
const NAME: &str = ".ami_id.json";

/// Writes the id of the definition's image. If there is no id, removes the file, because somebody could mistake an
/// older image for the result of a failed bake. An error is reported as a warning, because it does not affect the
/// image.
pub fn update(dir: &Path, id: Option<&ImageId>, report: &Report) {
    let result = match id {
        Some(id) => write(dir, id),
        None => remove(dir),
    };
    if let Err(error) = result {
        report.warn(format!("{error:#}"));
    }
}

/// Writes a temporary file and renames it, so that no reader sees an incomplete file.
fn write(dir: &Path, id: &ImageId) -> Result<()> {
    let path = dir.join(NAME);
    // The content has the same bytes as the file of GumGum's tool, because somebody may read it without a JSON parser.
    let content = format!("{{\"ami_id\": {}}}\n", json!(id));
    // An unchanged file is not written again. Only a regular file of the same size is read, because reading a FIFO with
    // this name would block forever.
    let is_candidate = path.symlink_metadata().is_ok_and(|m| m.is_file() && m.len() == content.len() as u64);
    if is_candidate && std::fs::read_to_string(&path).is_ok_and(|old| old == content) {
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
    fn the_file_names_the_image_or_does_not_exist() {
        let dir = tempfile::tempdir().unwrap();
        let (id, report) = (ImageId("ami-1".into()), Report::silent());
        update(dir.path(), None, &report);
        update(dir.path(), Some(&id), &report);
        assert_eq!(std::fs::read_to_string(dir.path().join(NAME)).unwrap(), "{\"ami_id\": \"ami-1\"}\n");
        update(dir.path(), None, &report);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_link_in_the_project_is_replaced_and_its_target_is_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (id, report) = (ImageId("ami-1".into()), Report::silent());
        let (target, link) = (dir.path().join("target"), dir.path().join(NAME));
        for text in ["mine", "{\"ami_id\": \"ami-1\"}\n"] {
            std::fs::write(&target, text).unwrap();
            std::os::unix::fs::symlink(&target, &link).unwrap();
            update(dir.path(), Some(&id), &report);
            assert!(link.symlink_metadata().unwrap().is_file());
            std::fs::remove_file(&link).unwrap();
            std::os::unix::fs::symlink(&target, &link).unwrap();
            update(dir.path(), None, &report);
            assert!(link.symlink_metadata().is_err());
            assert_eq!(std::fs::read_to_string(&target).unwrap(), text);
        }
    }
}
