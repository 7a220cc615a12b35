//! Packages that put symlinks to the host's files where oven, or apt, will write or delete.

use crate::lab::{Deb, Lab};

/// Plants a link in the place of whatever is there.
const PLANT: &str = "plant() { rm -rf \"$2\"; ln -s \"$1\" \"$2\"; }\n";

/// The canary's directory: as the host spells it, and from anywhere below.
fn spellings(lab: &Lab) -> [String; 2] {
    let canary = lab.canary().display().to_string();
    [canary.clone(), format!("../../../../../../../..{canary}")]
}

/// What is planted there, and what is to be there in the image: `None` for the link itself.
const PLANTED: [(&str, &str); 9] = [
    ("resolv.conf", "/etc/resolv.conf"),
    ("machine-id", "/etc/machine-id"),
    ("history", "/root/.bash_history"),
    ("log", "/var/log"),
    ("tmp", "/tmp"),
    ("ssh", "/etc/ssh"),
    ("log/journal", "/var/crash"),
    ("log", "/var/cache/apt"),
    ("log", "/var/lib/apt/lists"),
];

fn plant_all(to: &str) -> String {
    let lines = PLANTED.iter().map(|(file, at)| format!("plant {to}/{file} {at}\n"));
    PLANT.to_owned() + &lines.collect::<String>()
}

#[test]
fn links_to_the_host_lead_nowhere() {
    let lab = Lab::new();
    for to in spellings(&lab) {
        // What is done to the image after the packages goes through the links, too.
        let more = "[[file]]\nsource = \"f\"\ntarget = \"/etc/machine-id\"\n\
            [[run]]\nscript = \"f\"\nnetwork = true\n[[test]]\nscript = \"f\"\n";
        lab.world.write(
            "image/f",
            "#!/bin/sh\ncat /etc/resolv.conf > /dev/null; echo x > /var/log/f; echo x > /tmp/f; :\n",
        );
        lab.define(&[Deb::sh(&plant_all(&to))], more);
        let (disk, baked) = lab.image();
        for (file, at) in PLANTED {
            let link = disk.link(at);
            match at {
                "/etc/machine-id" => assert_eq!(disk.read(at).as_deref(), Some("")),
                "/root/.bash_history" => assert_eq!(disk.kind(at), None),
                _ => assert_eq!(link, Some(format!("{to}/{file}")), "{at}\n{}", baked.err),
            }
        }
    }
}
