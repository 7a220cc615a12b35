use super::*;
use crate::image::test::Tree;

#[test]
fn keys_ids_and_secrets_are_suspicious() {
    for (path, content) in [
        ("/etc/tripwire/site.key", "\u{1}\u{2}binary"),
        ("/etc/munge/munge.key", "\u{1}"),
        ("/etc/hostid", "\u{1}\u{2}\u{3}\u{4}"),
        ("/var/lib/app/.erlang.cookie", "ABCDEFGHIJ"),
        ("/var/lib/phpmyadmin/blowfish_secret.inc.php", "<?php\n"),
        ("/etc/app/id", "0b7dd1a4-6d5c-4d5a-9a0e-3f0a3a1d2c11\n"),
        ("/var/lib/app/node", "d41d8cd98f00b204e9800998ecf8427e\n"),
        ("/etc/dbconfig-common/app.conf", "# x\ndbc_dbuser='app'\ndbc_dbpass='wU3kx0AbqPzS'\n"),
        ("/etc/roundcube/config.inc.php", "<?php\n$config['des_key'] = 'kP0xH2vbGqLs8TzWdYcNfRaM';\n"),
        ("/etc/mysql/debian.cnf", "[client]\nuser     = debian-sys-maint\npassword = nLGr7PVxKcSTq2aF\n"),
        ("/etc/app.yml", "a: 1\n  api_key: \"AbCdEfGh12\"\n"),
        ("/etc/app.json", "{\n  \"auth-key\": \"a1b2c3d4e5\",\n}"),
        (DEBCONF_PASSWORDS, "Name: app/password\nTemplate: app/password\nValue: hunter2\nOwners: app\n"),
    ] {
        assert!(suspicion(path, content.as_bytes()).is_some(), "{path}");
    }
}

#[test]
fn usual_files_are_not() {
    for (path, content) in [
        ("/etc/default/keyboard", "XKBMODEL=\"pc105\"\n"),
        ("/etc/ssh/sshd_config", "PasswordAuthentication no\nAuthorizedKeysFile .ssh/authorized_keys\n"),
        ("/etc/passwd", "root:x:0:0:root:/root:/bin/bash\napp:x:998:997::/var/lib/app:/usr/sbin/nologin\n"),
        ("/etc/shadow", "root:*:19000:0:99999:7:::\napp:!:19000::::::\n"),
        (
            "/etc/app.conf",
            "# password = AbCdEfGh12\npassword =\nsecret = ${SECRET}\ntoken_file = /etc/x9Y8z7W6\n",
        ),
        ("/etc/app.pub", "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAI x\n"),
        ("/etc/keys.gpg", "\u{99}\u{1}"),
        ("/etc/x.key", "-----BEGIN CERTIFICATE-----\nMIIB\n"),
        ("/etc/hostname", "localhost\n"),
        ("/etc/timezone", "America/Argentina/Buenos_Aires\n"),
        ("/etc/mailname", "ip-172-31-22-111.eu-central-1.compute.internal\n"),
        ("/etc/version", "2024-01-01 12:13:14\n"),
        ("/etc/debian_version", "12.5\n"),
        ("/etc/cron.d/x", "5 3 * * * root /usr/bin/x\n"),
        ("/etc/adduser.conf", "PASSWORD_MIN=required\n"),
        ("/var/lib/initramfs-tools/6.1", "0123456789abcdef0123456789abcdef  /boot/initrd.img-6.1\n"),
        (DEBCONF_PASSWORDS, "Name: app/password\nTemplate: app/password\nOwners: app\n"),
    ] {
        assert_eq!(suspicion(path, content.as_bytes()), None, "{path}");
    }
}

#[test]
fn only_files_that_scripts_made_and_left_are_reported() {
    let tree = Tree::new();
    tree.file("etc/old.key", "x");
    // The clock for files advances only every few milliseconds.
    let made_before = tree.tree().version("/etc/old.key").unwrap().unwrap().modified;
    let begun = loop {
        let begun = BakeMoment::now().unwrap();
        if !begun.until_now().includes(made_before) {
            break begun;
        }
    };
    for path in ["gone.key", "kept.key", "changed.key", "placed.key", "made.key", "dir/made.key"] {
        tree.file(&format!("etc/{path}"), "x");
    }
    tree.file("var/log/app.key", "x");
    tree.file("var/cache/app/app.key", "x");
    tree.file("etc/apt/repo.key", "x");
    // A package's own file has the time of the package.
    tree.file("etc/packaged.key", "x");
    tree.open("etc/packaged.key").set_modified(std::time::UNIX_EPOCH).unwrap();
    let found = PackageMadeFiles::find(&tree.tree(), &begun, &["/etc/placed.key"]).unwrap();
    let paths: Vec<_> = found.files.keys().map(String::as_str).collect();
    let expected =
        ["/etc/changed.key", "/etc/dir/made.key", "/etc/gone.key", "/etc/kept.key", "/etc/made.key"];
    assert_eq!(paths, expected);
    tree.remove("etc/gone.key");
    tree.file("etc/changed.key", "the definition's own");
    tree.file("etc/nvme/hostid", "id");
    let remaining =
        ["/etc/nvme/hostid", "/etc/nvme/removed"].map(|path| (path.to_owned(), "an NVMe host id".to_owned()));
    let exempt = ["/etc/kept.key".to_owned()];
    let warning = found.warning(&tree.tree(), &exempt, &remaining).unwrap().unwrap();
    for part in
        ["/etc/nvme/hostid (an NVMe host id), /etc/dir/made.key (", "/etc/made.key (", "[clean] remove"]
    {
        assert!(warning.contains(part), "{warning}");
    }
    for part in ["gone", "kept.key", "changed", "old.key", "removed"] {
        assert!(!warning.contains(part), "{warning}");
    }
    let none = PackageMadeFiles::default().warning(&tree.tree(), &[], &[]).unwrap();
    assert_eq!(none, None);
}

#[test]
fn answers_of_package_managers() {
    for (line, path) in [
        ("bind9: /etc/bind/rndc.key", Some("/etc/bind/rndc.key")),
        ("a, b:amd64: /etc/x y", Some("/etc/x y")),
        ("diversion by a from: /etc/x", Some("/etc/x")),
        ("/etc/x", Some("/etc/x")),
        ("file /etc/x is not owned by any package", None),
        ("error: file /etc/x: No such file or directory", None),
        ("", None),
    ] {
        assert_eq!(owned_path(line), path, "{line}");
    }
    let paths = ["/a".to_owned(), "/b*".to_owned()];
    assert_eq!(dpkg_query(&paths), ["dpkg-query", "-S", "--", "/a"]);
    assert_eq!(rpm_query(&paths)[4..], paths);
}

#[test]
fn rpm_prints_one_line_a_path() {
    let bin = tempfile::tempdir().unwrap();
    let rpm = bin.path().join("rpm");
    // Like rpm, it prints a line for each package, and fails if no package owns a path.
    let script = "#!/bin/sh\ntest \"$1 $2\" = '-qf --' || exit 9\ncase $3 in\n/etc/owned*) echo a-1.0; echo b-1.0;;\n\
                  *) echo \"file $3 is not owned by any package\"; exit 1;;\nesac\n";
    std::fs::write(&rpm, script).unwrap();
    std::fs::set_permissions(&rpm, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let paths = ["/etc/owned a", "/etc/other", "/etc/owned$b", "-x"].map(str::to_owned);
    let argv = rpm_query(&paths);
    let path = format!("{}:/usr/bin:/bin", bin.path().display());
    let ran = std::process::Command::new(&argv[0]).args(&argv[1..]).env("PATH", path).output().unwrap();
    let answer = String::from_utf8(ran.stdout).unwrap();
    assert_eq!(answer.lines().filter_map(owned_path).collect::<Vec<_>>(), ["/etc/owned a", "/etc/owned$b"]);
    assert!(ran.stderr.is_empty() && answer.lines().count() == 2, "{answer}");
}

#[test]
fn a_query_that_fails_fails_no_bake_but_a_stop_does() {
    let mut details = Vec::new();
    let mut detail = |text| details.push(text);
    assert_eq!(unless_failed(Ok("x".to_owned()), &mut detail).unwrap().as_deref(), Some("x"));
    for kind in [Kind::Step, Kind::Machine, Kind::Definition] {
        assert_eq!(unless_failed(Err(kind.error("it took 120s")), &mut detail).unwrap(), None);
    }
    let stopped = unless_failed(Err(Kind::Interrupted.error("stopped")), &mut detail);
    assert_eq!(Kind::of(&stopped.unwrap_err()), Kind::Interrupted);
    assert!(details.len() == 3 && details.iter().all(|text| text.contains("it took 120s")), "{details:?}");
}

#[test]
fn known_secrets_that_machines_may_share_are_found_whatever_they_contain() {
    let (tree, begun) = (Tree::new(), BakeMoment::now().unwrap());
    let known: Vec<_> = IDENTITIES.iter().filter(|identity| identity.may_be_shared).collect();
    let mut paths: Vec<_> = known.iter().flat_map(|known| known.files).map(|file| file.path).collect();
    paths.iter().for_each(|path| tree.file(&path[1..], "usual\n"));
    let placed = paths.remove(0);
    let inside = tree.tree();
    let found = PackageMadeFiles::find(&inside, &begun, &[placed]).unwrap();
    assert!(!found.has_unchanged(&inside, placed).unwrap());
    for path in paths {
        assert!(found.has_unchanged(&inside, path).unwrap(), "{path}");
        tree.file(&path[1..], "a script wrote it\n");
        assert!(!found.has_unchanged(&inside, path).unwrap(), "{path}");
    }
}

#[test]
fn a_search_that_ends_early_is_reported() {
    for (count, name, is_incomplete) in [
        (FOUND_MAX, "key", false),
        (FOUND_MAX + 1, "key", true),
        (FILES_MAX, "conf", false),
        (FILES_MAX + 1, "conf", true),
    ] {
        let (tree, begun) = (Tree::new(), BakeMoment::now().unwrap());
        (0..count).for_each(|number| tree.file(&format!("etc/app/{number}.{name}"), "x"));
        let found = PackageMadeFiles::find(&tree.tree(), &begun, &[]).unwrap();
        assert_eq!(found.limit_warning().is_some(), is_incomplete, "{count} files: *.{name}");
    }
}
