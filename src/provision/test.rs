//! Creates a definition for tests without reading a file.

use crate::cloud::BaseRef;
use crate::definition::{BaseSource, Definition};
use crate::ids::ImageId;
use std::path::{Path, PathBuf};

pub fn definition(dir: &Path, change: impl FnOnce(&mut Definition)) -> Definition {
    let mut image = Definition {
        dir: dir.to_owned(),
        project: PathBuf::from("/"),
        name: "web".into(),
        from: BaseSource::Image(BaseRef::Id(ImageId("ami-1".into()))),
        ..Definition::default()
    };
    change(&mut image);
    image
}
