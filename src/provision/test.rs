//! A definition without a file, for tests.

use crate::cloud::BaseRef;
use crate::definition::{Definition, From};
use crate::ids::ImageId;
use oven_distro::Conffiles;
use std::path::{Path, PathBuf};

pub fn definition(dir: &Path, change: impl FnOnce(&mut Definition)) -> Definition {
    let mut image = Definition {
        name_is_default: false,
        dir: dir.to_owned(),
        project: PathBuf::from("/"),
        name: "web".into(),
        description: String::new(),
        from: From::Image(BaseRef::Id(ImageId("ami-1".into()))),
        packages: Vec::new(),
        repositories: Vec::new(),
        hold: Vec::new(),
        debconf: Vec::new(),
        files: Vec::new(),
        runs: Vec::new(),
        tests: Vec::new(),
        vars: Default::default(),
        size_gib: None,
        volume: Default::default(),
        registered: Default::default(),
        tags: std::collections::BTreeMap::new(),
        inputs: Vec::new(),
        upgrade: oven_distro::Upgrade::None,
        recommends: false,
        distro: None,
        conffiles: Conffiles::default(),
        selinux: Default::default(),
        network: false,
        imds: false,
        keep: Vec::new(),
    };
    change(&mut image);
    image
}
