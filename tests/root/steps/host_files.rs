//! Files of this machine in a step: shims and binds, and that the image is as it was afterwards.

use super::{HELPER, MINUTE, block_on, output, shim, try_run};
use oven::sandbox;
use oven::sandbox::spec::{BindMount, ExitStatus};
use oven_testing::BusyboxImage;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

#[test]
fn shims_are_there_while_the_step_runs_and_gone_after() {
    type Prepare = fn(&BusyboxImage);
    // What the image has itself cannot be changed meanwhile.
    let change =
        "rm -f /usr/sbin/policy-rc.d 2>/dev/null; (echo > /usr/sbin/policy-rc.d) 2>/dev/null; cat /run/x/y";
    let corpus: [(&str, &str, Prepare); 6] = [
        ("missing", "cat /run/x/y", |_| ()),
        ("its directory is missing", "cat /run/x/y", |image| fs::remove_dir(image.path("usr/sbin")).unwrap()),
        ("a file of mode 0644", change, |image| {
            fs::write(image.path("usr/sbin/policy-rc.d"), "#!/bin/sh\nexit 0\n").unwrap()
        }),
        ("the same file, but of mode 0644", change, |image| {
            fs::write(image.path("usr/sbin/policy-rc.d"), "#!/bin/sh\nexit 101\n").unwrap()
        }),
        ("a link to another program", change, |image| {
            symlink("../../bin/true", image.path("usr/sbin/policy-rc.d")).unwrap();
        }),
        ("a link in the way", "cat /run/x/y", |image| {
            fs::remove_dir(image.path("usr/sbin")).unwrap();
            symlink("/mnt", image.path("usr/sbin")).unwrap();
        }),
    ];
    for (case, then, prepare) in corpus {
        let image = BusyboxImage::new();
        prepare(&image);
        let before = image.listing();
        let mut spec = image.shell(&format!(
            "/usr/sbin/policy-rc.d; echo $?; /bin/true; echo $?; stat -L -c '%a %u' /usr/sbin/policy-rc.d; {then}"
        ));
        spec.shims = vec![
            shim("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755),
            shim("/run/x/y", "hello", 0o644),
        ];
        assert_eq!(output(&spec), ["101", "0", "755 0", "hello"], "{case}");
        assert_eq!(image.listing(), before, "{case}");
    }
    // What a step itself put into a directory that was made for a shim stays.
    let image = BusyboxImage::new();
    let mut spec = image.shell("touch /opt/a/kept");
    spec.shims = vec![shim("/opt/a/shim", "", 0o644)];
    output(&spec);
    assert!(image.path("opt/a/kept").exists() && !image.path("opt/a/shim").exists());
}

/// A package may ship a file where a shim is; a script may write one, or move it out of the way.
#[test]
fn what_a_step_puts_in_a_shims_place_stays() {
    let policy = "usr/sbin/policy-rc.d";
    for (script, left) in [
        ("echo own > /usr/sbin/policy-rc.d", Some("own\n")),
        ("echo own > /usr/sbin/new; mv /usr/sbin/new /usr/sbin/policy-rc.d", Some("own\n")),
        ("ln /usr/sbin/policy-rc.d /usr/sbin/backup; rm /usr/sbin/policy-rc.d", None),
        ("mv /usr/sbin/policy-rc.d /usr/sbin/aside; echo own > /usr/sbin/policy-rc.d", Some("own\n")),
        ("rm /usr/sbin/policy-rc.d; mkdir /usr/sbin/policy-rc.d; rmdir /usr/sbin/policy-rc.d", None),
        ("chmod 0 /usr/sbin/policy-rc.d", None),
        ("rm /usr/sbin/.oven-*", None),
        ("rm /usr/sbin/.oven-*; echo own > /usr/sbin/policy-rc.d", Some("own\n")),
        ("ln -sf ../../etc/own /usr/sbin/policy-rc.d; echo own > /etc/own", Some("own\n")),
    ] {
        let image = BusyboxImage::new();
        let mut spec = image.shell(&format!("set -e; {script}; echo done"));
        spec.shims = vec![shim("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)];
        assert_eq!(output(&spec), ["done"], "{script}");
        assert_eq!(fs::read_to_string(image.path(policy)).ok().as_deref(), left, "{script}");
        let others = fs::read_dir(image.path("usr/sbin")).unwrap().flatten();
        let others: Vec<_> = others.map(|e| e.file_name()).filter(|name| *name != *"policy-rc.d").collect();
        assert!(others.is_empty(), "{script}: {others:?}");
    }
}

/// Of this machine's file system: nothing in it can be made or removed while this lives.
struct Unchangeable(PathBuf);

impl Unchangeable {
    fn new(dir: PathBuf) -> Self {
        let status = Command::new("chattr").arg("+i").arg(&dir).status().expect("these tests need e2fsprogs");
        assert!(status.success(), "{} is on a file system without attributes", dir.display());
        Self(dir)
    }
}

impl Drop for Unchangeable {
    fn drop(&mut self) {
        _ = Command::new("chattr").arg("-i").arg(&self.0).status();
    }
}

/// A shim that cannot be removed fails a step that went well, for its image would have it. Of one that failed there is
/// no image, and its own failure is what is reported.
#[test]
fn the_failure_of_a_step_is_reported_rather_than_that_of_its_cleanup() {
    let image = BusyboxImage::new();
    for code in [0, 3] {
        let mut spec =
            image.shell(&format!("echo ready; while [ ! -e /tmp/go ]; do sleep 0.02; done; exit {code}"));
        spec.shims = vec![shim("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n", 0o755)];
        let mut guard = None;
        let ended = block_on(sandbox::run(Path::new(HELPER), &spec, MINUTE, &mut |line| {
            assert_eq!(line, "ready");
            guard = Some(Unchangeable::new(image.path("usr/sbin")));
            fs::write(image.path("tmp/go"), "").unwrap();
        }));
        drop(guard);
        fs::remove_file(image.path("tmp/go")).unwrap();
        let left = fs::read_dir(image.path("usr/sbin")).unwrap().map(|entry| entry.unwrap().path());
        let left: Vec<PathBuf> = left.collect();
        assert_eq!(left.len(), 2, "the removal did not fail: {left:?}");
        left.iter().for_each(|path| fs::remove_file(path).unwrap());
        match (code, ended) {
            (0, Err(error)) => {
                let text = format!("{error:#}");
                assert!(
                    text.contains("removing the step's temporary files from the image")
                        && text.contains("policy-rc.d"),
                    "{text}"
                );
            }
            (_, Ok(exit)) => assert_eq!((code, exit.status), (3, ExitStatus::Exited(3))),
            (code, Err(error)) => panic!("{code}: {error:#}"),
        }
    }
}

#[test]
fn hosts_files_are_bound_read_only() {
    let image = BusyboxImage::new();
    let host = tempfile::tempdir().unwrap();
    fs::create_dir_all(host.path().join("debs/inner")).unwrap();
    fs::write(host.path().join("debs/a.deb"), "A").unwrap();
    fs::write(host.path().join("ca.pem"), "CA").unwrap();
    fs::write(image.path("etc/ca.pem"), "image's").unwrap();
    symlink("ca.pem", image.path("etc/ca-link.pem")).unwrap();
    let before = image.listing();
    let mut spec = image.shell(
        "cat /run/oven/debs/a.deb /etc/ca.pem; (echo x > /run/oven/debs/a.deb) 2>/dev/null || echo refused; \
         touch /run/oven/debs/new 2>/dev/null || echo refused; (echo x > /etc/ca.pem) 2>/dev/null || echo refused",
    );
    let bind = |source: &str, target: &str| BindMount {
        source: host.path().join(source),
        target: target.into(),
        within: None,
        hidden: Vec::new(),
    };
    spec.binds = vec![bind("debs", "/run/oven/debs"), bind("ca.pem", "/etc/ca-link.pem")];
    assert_eq!(output(&spec), ["ACArefused", "refused", "refused"]);
    assert_eq!(image.listing(), before);
    assert_eq!(fs::read(host.path().join("debs/a.deb")).unwrap(), b"A");
    for (bind, said) in [
        (bind("debs", "/etc/ca.pem"), "is a directory, but the image's /etc/ca.pem is a file"),
        (bind("none", "/run/x"), "No such file"),
        (bind("ca.pem", "/etc/none"), "/etc/none was not found in the image"),
    ] {
        spec.binds = vec![bind];
        let error = format!("{:#}", try_run(&spec, MINUTE).unwrap_err());
        assert!(error.contains(said), "{error}");
    }
}

/// A checkout has credentials in `.git/config`. In a worktree, `.git` is a file.
#[test]
fn what_is_hidden_is_empty_for_the_step() {
    let image = BusyboxImage::new();
    let host = tempfile::tempdir().unwrap();
    for (path, content) in
        [(".git/config", "token"), ("a/b/.git", "gitdir: x"), ("a/seen", "yes"), ("to/.git/HEAD", "token")]
    {
        fs::create_dir_all(host.path().join(path).parent().unwrap()).unwrap();
        fs::write(host.path().join(path), content).unwrap();
    }
    symlink("to/.git", host.path().join("link")).unwrap();
    symlink("to/.git", host.path().join("a/.git")).unwrap();
    let mut spec = image.shell(
        "cd /run/oven/definition; ls -A .git to/.git link/; cat a/seen a/b/.git a/.git; \
         echo x > .git/new || echo refused; umount .git 2> /dev/null || echo mounted; cat .git/config || echo none",
    );
    spec.binds = vec![BindMount {
        source: host.path().to_owned(),
        target: "/run/oven/definition".into(),
        within: None,
        hidden: [".git", "a/.git", "a/b/.git", "to/.git", "gone/.git"].map(Into::into).into(),
    }];
    let lines = output(&spec).join("\n");
    assert!(!lines.contains("token") && !lines.contains("gitdir") && !lines.contains("HEAD"), "{lines}");
    for line in ["yes", "refused", "mounted", "none"] {
        assert!(lines.contains(line), "{line}: {lines}");
    }
    assert_eq!(fs::read_to_string(host.path().join(".git/config")).unwrap(), "token");
}

/// Who owns a definition may exchange its directory while oven, as root, is at work.
#[test]
fn a_bind_that_was_exchanged_is_refused() {
    let image = BusyboxImage::new();
    let host = tempfile::tempdir().unwrap();
    let project = host.path().canonicalize().unwrap().join("project");
    fs::create_dir_all(project.join("web")).unwrap();
    fs::create_dir(host.path().join("secrets")).unwrap();
    fs::write(host.path().join("secrets/key"), "secret").unwrap();
    let mut spec = image.shell("ls /run/oven/definition");
    let (source, target) = (project.join("web"), "/run/oven/definition".to_owned());
    spec.binds = vec![BindMount { source, target, within: Some(project.clone()), hidden: Vec::new() }];
    assert!(output(&spec).is_empty());
    fs::rename(project.join("web"), project.join("away")).unwrap();
    symlink("../secrets", project.join("web")).unwrap();
    let error = try_run(&spec, MINUTE).unwrap_err();
    assert!(format!("{error:#}").contains("secrets, which is outside the project"), "{error:#}");
    // One of the directories above it.
    fs::rename(&project, host.path().join("gone")).unwrap();
    fs::create_dir(host.path().join("other")).unwrap();
    fs::create_dir(host.path().join("other/web")).unwrap();
    symlink("other", &project).unwrap();
    let error = try_run(&spec, MINUTE).unwrap_err();
    assert!(format!("{error:#}").contains("other/web, which is outside the project"), "{error:#}");
}
