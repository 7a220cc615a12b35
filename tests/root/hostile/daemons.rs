//! Packages that start something, wait for something, or do not end.

use super::lab::{Deb, HostileLab};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// A daemon as of old: two forks, a session of its own, deaf to signals. It keeps the standard output open, and has
/// this world's name among its arguments, by which it is looked for afterwards.
fn daemon(lab: &HostileLab) -> String {
    format!(
        "perl -e 'use POSIX; $0 = \"cuckoo\"; $SIG{{$_}} = \"IGNORE\" for qw(HUP TERM INT); fork and exit; \
         POSIX::setsid(); fork and _exit(0); $0 = \"cuckoo {}\"; print \"hatched\\n\"; sleep 9 while 1'",
        lab.world.dir.path().display()
    )
}

#[test]
fn a_daemon_is_killed_and_named() {
    let lab = HostileLab::new();
    lab.define(&[Deb::sh(&daemon(&lab))], "");
    let (disk, baked) = lab.image();
    assert!(baked.err.contains("warning") && baked.err.contains("cuckoo"), "{}", baked.err);
    assert!(baked.took < Duration::from_secs(60), "{:?}", baked.took);
    assert_eq!(disk.audit(), "");
}

/// By all the ways that Debian's packages have, on an image where systemd is installed.
#[test]
fn services_do_not_start() {
    let lab = HostileLab::full();
    let unit = "[Service]\nExecStart=/usr/bin/touch /started/unit\n[Install]\nWantedBy=multi-user.target\n";
    let init = "#!/bin/sh\n### BEGIN INIT INFO\n# Provides: cuckoo\n# Required-Start:\n# Required-Stop:\n\
        # Default-Start: 2 3 4 5\n# Default-Stop:\n### END INIT INFO\ntouch /started/init\n";
    // The first lines are what debhelper writes into a postinst.
    let postinst = "deb-systemd-helper unmask nest.service\n\
        deb-systemd-helper enable nest.service\n\
        deb-systemd-helper update-state nest.service\n\
        deb-systemd-invoke start nest.service\n\
        update-rc.d cuckoo defaults\n\
        invoke-rc.d --skip-systemd-native cuckoo start\n\
        invoke-rc.d nest restart || exit 31\n\
        systemctl daemon-reload\n\
        systemctl --no-block start nest.service\n\
        systemctl restart nest\n\
        systemctl try-restart ssh\n\
        systemd-tmpfiles --create\n\
        systemd-sysusers\n\
        [ ! -d /run/systemd/system ]\n";
    let deb = Deb::sh(postinst)
        .file("/lib/systemd/system/nest.service", unit, 0o644)
        .file("/etc/init.d/cuckoo", init, 0o755)
        .file("/started/.keep", "", 0o644);
    lab.define(&[deb], "");
    let (disk, baked) = lab.image();
    assert_eq!(disk.list("/started"), [".keep"], "{}", baked.err);
    assert!(disk.list("/etc/systemd/system/multi-user.target.wants").contains(&"nest.service".to_owned()));
    assert!(!baked.err.contains("left processes running"), "{}", baked.err);
    assert_eq!(disk.read("/usr/sbin/policy-rc.d"), None);
}

/// `service` asks nobody.
#[test]
fn a_service_that_starts_all_the_same_is_killed_and_named() {
    let lab = HostileLab::new();
    let init = format!("#!/bin/sh\n{} > /dev/null 2>&1\n", daemon(&lab));
    let deb = Deb::sh("service cuckoo start").file("/etc/init.d/cuckoo", &init, 0o755);
    lab.define(&[deb], "");
    let (_, baked) = lab.image();
    assert!(baked.err.contains("cuckoo"), "{}", baked.err);
}

#[test]
fn a_question_gets_the_default_answer() {
    let lab = HostileLab::new();
    let templates = "Template: hostile/colour\nType: string\nDefault: blue\nDescription: Which colour?\n\n\
        Template: hostile/license\nType: boolean\nDefault: false\nDescription: Agreed?\n\n\
        Template: hostile/none\nType: password\nDescription: The password?\n";
    let config = "#!/bin/sh\nset -e\n. /usr/share/debconf/confmodule\nfor q in colour license none; do \
        db_input critical hostile/$q || true; done\ndb_go || true\n";
    let debconf = "#!/bin/sh\nset -e\n. /usr/share/debconf/confmodule\nfor q in colour license none; do \
        db_get hostile/$q; echo \"$q=$RET\" >> /answers; done\n";
    // Not in the same script: under debconf the standard input is debconf.
    let plain = "exec >> /answers\nread line && echo \"read $line\" || echo 'read nothing'\n\
        if read line < /dev/tty; then echo \"tty $line\"; else echo 'no tty'; fi\n\
        test -t 0 || test -t 1 || test -t 2 || echo 'no terminal'\n";
    let deb = Deb::new("hostile")
        .field("Depends: debconf")
        .script("templates", templates)
        .script("config", config)
        .script("postinst", debconf);
    lab.define(&[Deb::sh(plain).named("plain"), deb], "");
    let (disk, baked) = lab.image();
    assert_eq!(
        disk.read("/answers").as_deref(),
        Some("colour=blue\nlicense=false\nnone=\nread nothing\nno tty\nno terminal\n"),
        "{}",
        baked.err
    );
    assert!(baked.took < Duration::from_secs(60), "{:?}", baked.took);
}

#[test]
fn a_script_that_fails_is_named_with_its_package() {
    let lab = HostileLab::new();
    for (script, says) in [
        ("postinst", "the package `hostile` could not be configured"),
        ("preinst", "hostile"),
        ("config", "hostile"),
    ] {
        let failing = "#!/bin/sh\necho the reason >&2\nexit 3\n";
        let mut deb = Deb::new("hostile").script(script, failing);
        if script == "config" {
            let template = "Template: hostile/x\nType: string\nDescription: X?\n";
            let loads = "#!/bin/sh\n. /usr/share/debconf/confmodule\n";
            deb = deb.script("templates", template).script("postinst", loads).field("Pre-Depends: debconf");
        }
        let needs = Deb::new("innocent").field("Depends: hostile");
        lab.define(&[needs, deb], "");
        lab.fails(5, &[says, "the reason", "hostile", ".log"]);
    }
}

#[test]
fn a_package_that_hangs_ends_with_oven() {
    let lab = HostileLab::new();
    let daemon = daemon(&lab);
    lab.define(
        &[Deb::sh(&format!("trap '' TERM INT HUP\n{daemon}\necho waiting\nwhile :; do sleep 1; done"))],
        "",
    );
    for (signal, count) in [(Signal::SIGTERM, 1), (Signal::SIGINT, 2)] {
        let mut command = lab.command();
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let start = Instant::now();
        let child = command.spawn().unwrap();
        lab.await_logs("waiting", count);
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        let stopped = Instant::now();
        kill(pid, signal).unwrap();
        let output = child.wait_with_output().unwrap();
        assert!(stopped.elapsed() < Duration::from_secs(15), "{:?}", stopped.elapsed());
        let baked = lab.ended(&output, start.elapsed());
        lab.failed(&baked, 130, &[]);
    }
}

#[test]
fn a_script_that_hangs_is_killed_when_its_time_is_over() {
    let lab = HostileLab::new();
    lab.define(&[], "[[run]]\nscript = \"hang.sh\"\ntimeout = 2");
    let script = format!("#!/bin/sh\n{}\nexec sleep 1000\n", daemon(&lab));
    lab.world.write("image/hang.sh", &script);
    let baked = lab.fails(5, &["hang.sh", "longer than 2 s", "`timeout`", "[[run]]"]);
    assert!(baked.took < Duration::from_secs(30), "{:?}", baked.took);
}
