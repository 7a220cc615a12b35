//! Reads the content of a baked image without mounting it.

use crate::{LocalWorld, stderr};
use std::path::Path;
use std::process::Command;

/// The root file system of an image.
pub struct ImageReader(String);

impl ImageReader {
    /// Opens an image in this world's region.
    pub fn of(world: &LocalWorld, ami: &str) -> Self {
        let (out, _) = world.expect(0, &["--json", "images", "show", ami]);
        let object: serde_json::Value = serde_json::from_str(out.trim()).unwrap();
        let snapshot = object["snapshot"].as_str().unwrap();
        Self::in_file(&world.region().join("snapshots").join(format!("{snapshot}.img")))
    }

    pub fn in_file(raw: &Path) -> Self {
        let table = Command::new("sfdisk").arg("--json").arg(raw).output().unwrap();
        let table: serde_json::Value = serde_json::from_slice(&table.stdout).unwrap();
        let partitions = table["partitiontable"]["partitions"].as_array().unwrap();
        let root = partitions.iter().max_by_key(|p| p["size"].as_u64()).unwrap();
        Self(format!("{}?offset={}", raw.display(), root["start"].as_u64().unwrap() * 512))
    }

    pub fn debugfs(&self, request: &str) -> (String, String) {
        let output = Command::new("debugfs").args(["-R", request, &self.0]).output().unwrap();
        (String::from_utf8_lossy(&output.stdout).into_owned(), stderr(&output))
    }

    /// Executes a request that changes the file system. It must not be mounted.
    pub fn change(&self, request: &str) {
        let output = Command::new("debugfs").args(["-w", "-R", request, &self.0]).output().unwrap();
        // debugfs prints one line with its version, and then its errors.
        let said = stderr(&output);
        assert!(output.status.success() && said.lines().count() <= 1, "{request}: {said}");
    }

    /// Returns `None` if the file does not exist.
    pub fn read(&self, path: &str) -> Option<String> {
        let (out, err) = self.debugfs(&format!("cat {path}"));
        (!err.contains("File not found")).then_some(out)
    }

    pub fn list(&self, path: &str) -> Vec<String> {
        let (out, _) = self.debugfs(&format!("ls -p {path}"));
        let names = out.lines().filter_map(|line| line.split('/').nth(5));
        names.filter(|name| !matches!(*name, "" | "." | "..")).map(str::to_owned).collect()
    }

    /// Returns the word after `label` in the output of `stat`.
    fn stat(&self, path: &str, label: &str) -> Option<String> {
        let (out, err) = self.debugfs(&format!("stat {path}"));
        assert!(err.lines().count() <= 1 || err.contains("File not found"), "{path}: {err}");
        let rest = out.split_once(label)?.1.trim_start();
        Some(rest.split_whitespace().next().unwrap_or_default().to_owned())
    }

    /// Returns `regular`, `directory`, `symlink` and so on, or `None` if nothing is at the path.
    pub fn kind(&self, path: &str) -> Option<String> {
        self.stat(path, "Type:")
    }

    /// Returns the permission bits in octal, including the set-user-ID, set-group-ID and sticky bits.
    pub fn mode(&self, path: &str) -> Option<String> {
        self.stat(path, "Mode:")
    }

    /// Returns the numbers of the owner and the group, or `None` if nothing is at the path.
    pub fn owner(&self, path: &str) -> Option<(u32, u32)> {
        let number = |label| self.stat(path, label)?.parse().ok();
        Some((number("User:")?, number("Group:")?))
    }

    /// Returns the content of a file that is not text. It is empty if the file does not exist.
    pub fn bytes(&self, path: &str) -> Vec<u8> {
        let copy = tempfile::NamedTempFile::new().unwrap();
        self.debugfs(&format!("dump {path} {}", copy.path().display()));
        std::fs::read(copy.path()).unwrap()
    }

    /// Returns the path of the raw disk.
    pub fn raw(&self) -> &Path {
        Path::new(self.0.split('?').next().unwrap_or_default())
    }

    /// Returns the number of lines of the raw disk that contain this text. It also finds text in removed files whose
    /// blocks were not discarded.
    pub fn grep(&self, text: &str) -> usize {
        let output = Command::new("grep").args(["-aoc", text]).arg(self.raw()).output().unwrap();
        String::from_utf8_lossy(&output.stdout).trim().parse().unwrap()
    }

    /// Returns a file's size in bytes.
    pub fn size(&self, path: &str) -> u64 {
        self.stat(path, "Size:").and_then(|size| size.parse().ok()).unwrap_or_default()
    }

    /// Returns the UUID of the file system.
    pub fn uuid(&self) -> String {
        let (out, _) = self.debugfs("show_super_stats -h");
        let line = out.lines().find_map(|line| line.strip_prefix("Filesystem UUID:"));
        line.expect(&out).trim().to_owned()
    }

    /// Returns the target of a symlink.
    pub fn link(&self, path: &str) -> Option<String> {
        if self.kind(path)? != "symlink" {
            return None;
        }
        match self.stat(path, "Fast link dest:") {
            Some(short) => Some(short.trim_matches('"').to_owned()),
            None => self.read(path),
        }
    }

    pub fn fsck(&self) -> (bool, String) {
        let output = Command::new("e2fsck").args(["-fn", &self.0]).output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Returns the output of `dpkg --audit` for the image's database.
    pub fn audit(&self) -> String {
        let dir = tempfile::tempdir().unwrap();
        for file in ["status", "available", "diversions", "statoverride"] {
            let content = self.read(&format!("/var/lib/dpkg/{file}")).unwrap_or_default();
            std::fs::write(dir.path().join(file), content).unwrap();
        }
        // The foreign architectures, if there are any.
        if let Some(content) = self.read("/var/lib/dpkg/arch") {
            std::fs::write(dir.path().join("arch"), content).unwrap();
        }
        for sub in ["info", "updates", "triggers"] {
            self.debugfs(&format!("rdump /var/lib/dpkg/{sub} {}", dir.path().display()));
        }
        let output = Command::new("dpkg").arg("--admindir").arg(dir.path()).arg("--audit").output().unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), stderr(&output))
    }
}
