//! Plugins know packages, and nothing of clouds, disks, or this machine: read from their sources, manifests and plans.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const PLUGINS: [&str; 4] = ["debian", "redhat", "rpm", "suse"];

fn path(below: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("plugins").join(below)
}

/// Crates that a crate is built with, tests included.
fn dependencies(below: &str) -> BTreeSet<String> {
    let text = std::fs::read_to_string(path(below).join("Cargo.toml")).unwrap();
    let manifest: toml::Table = text.parse().unwrap();
    let tables = ["dependencies", "dev-dependencies", "build-dependencies", "target"];
    let tables = tables.iter().filter_map(|table| manifest.get(*table)?.as_table());
    tables.flat_map(|table| table.keys().cloned()).collect()
}

fn files(dir: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, ending));
        } else if path.extension().is_some_and(|e| e == ending) {
            found.push(path);
        }
    }
    found
}

#[test]
fn the_contract_stands_on_serde_alone_and_plugins_on_the_contract() {
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(dependencies("api"), set(&["serde", "serde_json"]));
    let known = set(&["oven-distro", "oven-rpm", "serde_json"]);
    for plugin in PLUGINS {
        let all = dependencies(plugin);
        assert!(all.is_subset(&known) && all.contains("oven-distro"), "{plugin}: {all:?}");
    }
}

/// No disk: every step has it, and scripts say by it what they are not interested in.
const NULL: &str = "/dev/null";

/// What a word of it says is not a plugin's to know.
#[test]
fn no_plugin_names_a_cloud_a_disk_or_a_path_of_the_builder() {
    let words = |text: &str| {
        let word = |c: char| !c.is_ascii_alphanumeric();
        let clouds =
            ["aws", "ec2", "ebs", "s3", "ami", "azure", "gcp", "nvme", "xvda", "sda", "loop", "loop0"];
        let word =
            text.to_ascii_lowercase().split(word).find(|found| clouds.contains(found)).map(str::to_owned);
        let paths = ["/dev/", "/work/", "/home/", "/mnt/", "169.254.", env!("CARGO_MANIFEST_DIR")];
        word.or_else(|| paths.iter().find(|path| text.contains(*path)).map(|path| (*path).to_owned()))
    };
    for (said, told) in [("the AMI's id", "ami"), ("/dev/sdb", "/dev/"), ("root=/x on loop0", "loop0")] {
        assert_eq!(words(said).as_deref(), Some(told), "{said}");
    }
    assert_eq!(words("Amazon Linux, amzn, foamink"), None);
    for plugin in PLUGINS.iter().chain(&["api"]) {
        for file in files(&path(plugin).join("src"), "rs") {
            // What the contract refuses it has to name.
            if file.ends_with("api/src/valid.rs") || file.ends_with("api/src/valid/tests.rs") {
                continue;
            }
            let text = std::fs::read_to_string(&file).unwrap().replace(NULL, "");
            assert_eq!(words(&text), None, "{}", file.display());
        }
    }
    let mut plans = 0;
    for plugin in PLUGINS.iter().filter(|plugin| **plugin != "rpm") {
        for file in files(&path(plugin).join("tests"), "json") {
            // A kernel's package has a cloud in its name: the definition asks for it.
            let text =
                std::fs::read_to_string(&file).unwrap().replace("linux-image-aws", "").replace(NULL, "");
            assert_eq!(words(&text), None, "{}", file.display());
            plans += 1;
        }
    }
    assert!(plans >= 10, "{plans}");
}
