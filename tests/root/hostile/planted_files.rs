//! Packages that put symlinks to the host's files where oven, or apt, will write or delete.

use super::lab::{Deb, HostileLab};

/// Plants a link in the place of whatever is there: what is mounted there is moved out of the way together with the
/// directory that it is in.
const PLANT: &str = "plant() {\n\
    rm -rf \"$2\" 2> /dev/null || { mv \"${2%/*}\" \"${2%/*}.aside\"; mkdir \"${2%/*}\"; }\n\
    ln -s \"$1\" \"$2\"\n}\n";

/// What is planted in the place of what.
const PLANTED: [(&str, &str); 10] = [
    ("resolv.conf", "/etc/resolv.conf"),
    ("machine-id", "/etc/machine-id"),
    ("history", "/root/.bash_history"),
    ("log", "/var/log"),
    ("tmp", "/tmp"),
    ("ssh", "/etc/ssh"),
    ("log/journal", "/var/crash"),
    ("log", "/var/cache/apt"),
    ("log", "/var/lib/apt/lists"),
    ("policy-rc.d", "/opt/policy-rc.d"),
];

fn plant_all(to: &str) -> String {
    let lines = PLANTED.iter().map(|(file, at)| format!("plant {to}/{file} {at}\n"));
    PLANT.to_owned() + &lines.collect::<String>()
}

/// What is done to the image after the packages.
const AFTER: &str = "[[file]]\nsource = \"f\"\ntarget = \"/etc/machine-id\"\n\
    [[file]]\nsource = \"f\"\ntarget = \"/root/.bash_history\"\n\
    [[run]]\nscript = \"f\"\nnetwork = true\n[[test]]\nscript = \"f\"\n";
const SCRIPT: &str =
    "#!/bin/sh\ncat /etc/resolv.conf\nfor f in /var/log/f /tmp/f; do echo x > $f; done\nexit 0\n";

#[test]
fn links_to_the_host_lead_nowhere() {
    let lab = HostileLab::new();
    lab.world.write("image/f", SCRIPT);
    let canary = lab.canary().display().to_string();
    for to in [
        canary.clone(),
        format!("../../../../../../../..{canary}"),
        format!("/proc/1/root{canary}"),
        format!("/proc/self/cwd/../../../..{canary}"),
    ] {
        lab.define(&[Deb::sh(&plant_all(&to))], AFTER);
        let (disk, baked) = lab.image();
        for (file, at) in PLANTED {
            match at {
                "/etc/machine-id" => assert_eq!(disk.read(at).as_deref(), Some("")),
                "/root/.bash_history" => assert_eq!(disk.kind(at), None),
                _ => assert_eq!(disk.link(at), Some(format!("{to}/{file}")), "{at}\n{}", baked.err),
            }
        }
    }
}

#[test]
fn links_in_a_circle_hold_nothing_up() {
    let lab = HostileLab::new();
    lab.world.write("image/f", SCRIPT);
    let circle = |(_, at): &(&str, &str)| format!("plant {at} {at}\n");
    let lines = PLANTED.iter().map(circle).collect::<String>();
    lab.define(&[Deb::sh(&(PLANT.to_owned() + &lines))], AFTER);
    let (disk, _) = lab.image();
    assert_eq!(disk.link("/var/log").as_deref(), Some("/var/log"));
    assert_eq!(disk.read("/etc/machine-id").as_deref(), Some(""));
}

/// The directory above what is written to.
#[test]
fn a_file_that_cannot_be_placed_is_a_failed_step() {
    let lab = HostileLab::new();
    lab.world.write("image/f", SCRIPT);
    let canary = lab.canary().display().to_string();
    for to in [&*canary, "/opt/x"] {
        lab.define(
            &[Deb::sh(&format!("{PLANT}plant {to} /opt/x"))],
            "[[file]]\nsource = \"f\"\ntarget = \"/opt/x/f\"",
        );
        lab.fails(5, &["/opt/x/f", "image/f"]);
    }
}

#[test]
fn directories_of_the_system_cannot_be_led_away() {
    let lab = HostileLab::new();
    let canary = lab.canary().display().to_string();
    for dir in ["/etc", "/var", "/root"] {
        lab.world.write("image/f", SCRIPT);
        let postinst = format!("mv {dir} /real; ln -s {canary} {dir}");
        lab.define(&[Deb::sh(&postinst)], AFTER);
        if dir == "/root" {
            // Nothing needs it: an image without a home for root, and with a link that leads nowhere.
            lab.fails(5, &["/root/.bash_history"]);
        } else {
            lab.fails(5, &[]);
        }
    }
}

/// Names that are no text, trees that are deep, and what blocks whoever opens it.
#[test]
fn odd_names_and_odd_files_are_cleaned_like_others() {
    let lab = HostileLab::new();
    let postinst = "cd /var/log\nfor name in $(printf 'a\\tb') '-rf' '*'; do\n\
        mkdir -p \"/tmp/$name\" \"/var/log/dir$name\"\n\
        for f in \"/tmp/$name/f\" \"/var/log/$name.log\" \"/var/log/dir$name/f\" \"/var/tmp/$name\"; do echo zzztop''secret > \"$f\"; done\n\
        done\n\
        perl -e 'for (1..150) { mkdir \"d\" and chdir \"d\" or die $! } open(F, \">f\")' \n\
        (cd /tmp; perl -e 'for (1..150) { mkdir \"d\" and chdir \"d\" or die $! } open(F, \">f\")')\n\
        for f in /tmp /var/tmp; do echo zzztop''secret > $f/$(printf '\\377'); done\n\
        mkfifo /var/log/pipe /tmp/pipe /root/.zsh_history\n\
        perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new(Local => \"/tmp/socket\", Listen => 1) or die'\n\
        ln /etc/hostname /var/log/hostname.log\n";
    lab.define(&[Deb::sh(postinst)], "");
    let (disk, baked) = lab.image();
    assert_eq!(disk.list("/tmp"), [""; 0], "{}", baked.err);
    assert_eq!(disk.list("/var/tmp"), [""; 0]);
    assert_eq!(disk.kind("/root/.zsh_history"), None);
    assert_eq!(disk.kind("/var/log/hostname.log"), None);
    assert_eq!(disk.read("/etc/hostname").as_deref(), Some("debian\n"));
    assert_eq!(disk.grep("zzztopsecret"), 0, "{}", baked.err);

    let deep = "cd /tmp; perl -e 'for (1..3000) { mkdir \"d\" and chdir \"d\" or die $! }'";
    // Neither the depth of a directory nor a name that is not UTF-8 is an obstacle.
    let log = "echo zzztop''secret > /var/log/$(printf '\\377').log";
    lab.define(&[Deb::sh(&format!("{deep}\n{log}"))], "");
    let (disk, baked) = lab.image();
    assert_eq!(disk.list("/tmp"), [""; 0], "{}", baked.err);
    assert_eq!(disk.grep("zzztopsecret"), 0, "{}", baked.err);
}

#[test]
fn a_fifo_in_the_place_of_a_file_blocks_nothing() {
    let lab = HostileLab::new();
    let fifo = "fifo() { for f; do rm -rf \"$f\"; mkfifo \"$f\"; done; }\n";
    for (files, code) in [
        (
            "/etc/machine-id /etc/resolv.conf /etc/fstab /root/.bash_history /var/log/apt/term.log /usr/sbin/policy-rc.d",
            0,
        ),
        // Without accounts nobody knows where histories are.
        ("/etc/passwd", 5),
    ] {
        lab.world.write("image/look.sh", "#!/bin/sh\ncat /usr/sbin/policy-rc.d /etc/resolv.conf\n");
        lab.world.write("image/fifo.sh", &format!("#!/bin/sh\n{fifo}fifo {files}\n"));
        lab.define(
            &[Deb::new("innocent")],
            "[[run]]\nscript = \"fifo.sh\"\n[[run]]\nscript = \"look.sh\"\nnetwork = true",
        );
        let baked = lab.bake();
        assert_eq!(baked.code, Some(code), "{files}\n{}", baked.err);
        assert!(baked.took < std::time::Duration::from_secs(60), "{:?}", baked.took);
    }
}
