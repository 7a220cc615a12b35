//! Discovery for the VM tests: finds volumes in this machine as a bake does, and says what it got.
//!
//! usage: oven-test-nvme \[VOLUME\]...
//!
//! Without volumes, it reads them from standard input, a line of them at a time. For each line of input one line of
//! answers, a word for each volume: `vol-1=nvme2n1/259:3/vol-1`, the last being the text that the disk begins with,
//! read from the descriptor that was verified; `vol-1=none`; or `vol-1=refused/why,with,commas`.

use oven::cloud::aws::nvme;
use oven::ids::VolumeId;
use std::fs::File;
use std::io::{BufRead, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

fn main() {
    let volumes: Vec<String> = std::env::args().skip(1).collect();
    if !volumes.is_empty() {
        println!("{}", answer(&volumes.join(" ")));
        return;
    }
    for line in std::io::stdin().lock().lines() {
        println!("{}", answer(&line.expect("standard input")));
        std::io::stdout().flush().expect("standard output");
    }
}

fn answer(volumes: &str) -> String {
    volumes.split_whitespace().map(|id| format!("{id}={}", look(id))).collect::<Vec<_>>().join(" ")
}

fn look(id: &str) -> String {
    match nvme::find(Path::new("/sys"), Path::new("/dev"), &VolumeId(id.to_owned())) {
        Ok(None) => "none".to_owned(),
        Err(error) => format!("refused/{}", format!("{error:#}").replace(' ', ",")),
        Ok(Some(device)) => {
            let (major, minor) = (rustix::fs::major(device.rdev), rustix::fs::minor(device.rdev));
            let name = device.path.file_name().expect("a node has a name").to_string_lossy().into_owned();
            let mut begin = [0; 64];
            let text = match File::from(device.node).read_exact_at(&mut begin, 0) {
                Ok(()) => String::from_utf8_lossy(&begin).trim_end_matches('\0').to_owned(),
                Err(error) => format!("unreadable:{}", error.kind()).replace(' ', ","),
            };
            format!("{name}/{major}:{minor}/{text}")
        }
    }
}
