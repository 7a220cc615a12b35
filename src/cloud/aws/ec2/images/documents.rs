//! Stores the documents of images. A document is a text that is stored with an image, such as the list of its packages
//! ([`ImageSpec::documents`](crate::cloud::ImageSpec::documents)). EC2 cannot store documents, so they are files on the
//! builder.

use crate::cloud::aws::ec2::Ec2;
use crate::ids::{ImageId, RunId};
use crate::sys::state_files;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// The documents of an image that is not registered yet. They are in a temporary file. [`Self::keep`] makes the file
/// permanent. If the draft is dropped before, the file is deleted.
pub struct DocumentDraft {
    file: NamedTempFile,
    dir: PathBuf,
}

impl DocumentDraft {
    /// Writes the documents to the temporary file. This is done before the image is registered. If the disk is full,
    /// this fails, and no image has to be deregistered.
    pub fn write(dir: &Path, run: &RunId, documents: &BTreeMap<String, String>) -> Result<Option<Self>> {
        if documents.is_empty() {
            return Ok(None);
        }
        let context = || format!("storing the documents of an image in {}", dir.display());
        let write = || -> Result<Self> {
            state_files::create_dir(dir)?;
            let mut file = tempfile::Builder::new().prefix(&format!(".{}-", run.short())).tempfile_in(dir)?;
            file.write_all(&serde_json::to_vec_pretty(documents)?)?;
            file.as_file().sync_all()?;
            Ok(Self { file, dir: dir.to_owned() })
        };
        write().with_context(context).map(Some)
    }

    pub fn keep(self, id: &ImageId) -> Result<()> {
        let path = path(&self.dir, id);
        self.file.persist(&path).with_context(|| format!("writing {}", path.display()))?;
        Ok(())
    }
}

fn path(dir: &Path, id: &ImageId) -> PathBuf {
    dir.join(format!("{id}.json"))
}

pub fn read(dir: &Path, id: &ImageId) -> Result<BTreeMap<String, String>> {
    let path = path(dir, id);
    let text = match fs::read(&path) {
        Ok(text) => text,
        // There is no file if the image was baked on another builder.
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(e) => return Err(e).with_context(|| format!("reading {}", path.display())),
    };
    serde_json::from_slice(&text).with_context(|| format!("reading {}", path.display()))
}

impl Ec2 {
    pub(crate) fn documents(&self, id: &ImageId) -> Result<BTreeMap<String, String>> {
        read(&self.0.options.documents, id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_found_by_image_id_and_dropped_drafts_are_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("documents");
        let (run, id) = (RunId::new(), ImageId("ami-0123456789abcdef0".into()));
        let documents = BTreeMap::from([("packages".to_owned(), "nginx 1".to_owned())]);
        assert!(DocumentDraft::write(&dir, &run, &BTreeMap::new()).unwrap().is_none());
        drop(DocumentDraft::write(&dir, &run, &documents).unwrap().unwrap());
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        assert_eq!(read(&dir, &id).unwrap(), BTreeMap::new());
        DocumentDraft::write(&dir, &run, &documents).unwrap().unwrap().keep(&id).unwrap();
        assert_eq!(read(&dir, &id).unwrap(), documents);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }
}
