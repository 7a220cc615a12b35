use super::*;
use crate::image::test::Tree;
use std::process::Command;

const KEY: &str = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSj\n";

fn path_of(tree: &Tree) -> std::path::PathBuf {
    let tree = tree.tree();
    std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&tree.dir()))).unwrap()
}

fn git(tree: &Tree, dir: &str, arguments: &[&str]) {
    let dir = path_of(tree).join(dir);
    let identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main"];
    let mut git = Command::new("git");
    for name in ["GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "GIT_OBJECT_DIRECTORY", "GIT_DEFAULT_HASH"] {
        git.env_remove(name);
    }
    git.env("GIT_CONFIG_GLOBAL", "/dev/null").env("GIT_CONFIG_NOSYSTEM", "1");
    let ran = git.arg("-C").arg(dir).args(identity).args(arguments).output().unwrap();
    assert!(ran.status.success(), "{arguments:?}: {ran:?}");
}

fn commit(tree: &Tree, dir: &str) {
    git(tree, dir, &["add", "-A", "-f"]);
    git(tree, dir, &["commit", "-q", "-m", "first"]);
}

/// An image with keys, and etckeeper.
fn image() -> Tree {
    let tree = Tree::new();
    for path in ["usr/lib/systemd/systemd", "usr/bin/etckeeper"] {
        tree.file(path, "x");
    }
    for (path, content) in [
        ("etc/machine-id", "0123456789abcdef0123456789abcdef\n"),
        ("etc/ssh/ssh_host_rsa_key", "host key"),
        ("etc/ssl/private/ssl-cert-snakeoil.key", "snakeoil"),
        ("etc/nvme/hostid", "an id"),
        ("etc/hostname", "x\n"),
        ("srv/app/secret", "removed on request"),
        ("srv/app/main.py", "pass\n"),
    ] {
        tree.file(path, content);
    }
    tree
}

fn unclean(tree: &Tree, keep: &[&str]) -> Vec<(String, String)> {
    let keep: Vec<_> = keep.iter().map(|path| (*path).to_owned()).collect();
    let mut removed = RemovedFiles::read(&tree.tree(), &["/srv/app/secret".to_owned()]).unwrap();
    for path in ["etc/machine-id", "etc/ssh", "etc/ssl", "etc/nvme", "srv/app/secret"] {
        tree.remove(path);
    }
    let found = removed.find_repositories(&tree.tree(), &keep).unwrap();
    found.into_iter().map(|found| (found.path, found.what)).collect()
}

#[test]
fn repositories_with_removed_files_are_found() {
    for only in [
        "etc/machine-id",
        "etc/ssh/ssh_host_rsa_key",
        "etc/ssl/private/ssl-cert-snakeoil.key",
        "etc/nvme/hostid",
    ] {
        for packed in [false, true] {
            let tree = image();
            git(&tree, "etc", &["init", "-q"]);
            git(&tree, "etc", &["add", "-f", only.strip_prefix("etc/").unwrap()]);
            git(&tree, "etc", &["commit", "-q", "-m", "first"]);
            git(&tree, "etc", &["rm", "-q", "--cached", only.strip_prefix("etc/").unwrap()]);
            git(&tree, "etc", &["commit", "-q", "--allow-empty", "-m", "second"]);
            if packed {
                git(&tree, "etc", &["gc", "-q"]);
            }
            let found = unclean(&tree, &[]);
            assert!(
                found.len() == 1 && found[0].0 == "/etc/.git" && found[0].1.contains(only),
                "{only}: {found:?}"
            );
        }
    }
}

#[test]
fn bare_repositories_other_formats_and_other_systems_are_found() {
    let tree = image();
    tree.file("var/x", "x");
    git(&tree, "srv/app", &["init", "-q", "--object-format=sha256"]);
    commit(&tree, "srv/app");
    git(
        &tree,
        "etc",
        &["init", "-q", "--separate-git-dir", path_of(&tree).join("var/backup").to_str().unwrap()],
    );
    commit(&tree, "etc");
    for other in ["etc/.hg/store", "etc/_darcs/x", "srv/code/.hg/store"] {
        tree.file(other, "x");
    }
    let paths: Vec<_> = unclean(&tree, &[]).into_iter().map(|(path, _)| path).collect();
    assert_eq!(paths, ["/etc/.hg", "/etc/_darcs", "/srv/app/.git", "/var/backup"]);
}

#[test]
fn a_key_that_a_script_removed_is_found_in_etc_only() {
    let tree = image();
    for dir in ["etc/app", "srv/code"] {
        tree.file(&format!("{dir}/test.key"), KEY);
        git(&tree, dir, &["init", "-q"]);
        commit(&tree, dir);
        tree.remove(&format!("{dir}/test.key"));
    }
    let found = unclean(&tree, &[]);
    assert!(found.len() == 1 && found[0].1.contains("a private key"), "{found:?}");
    assert_eq!(found[0].0, "/etc/app/.git");
}

#[test]
fn clean_and_accepted_repositories_stay() {
    let tree = image();
    git(&tree, "srv/app", &["init", "-q"]);
    git(&tree, "srv/app", &["add", "main.py"]);
    git(&tree, "srv/app", &["commit", "-q", "-m", "first"]);
    git(&tree, "etc", &["init", "-q"]);
    commit(&tree, "etc");
    tree.file("srv/objects/x", "not a repository");
    tree.file("srv/damaged/objects/pack/x.idx", "short");
    tree.file("srv/damaged/HEAD", "ref: x\n");
    tree.file("srv/damaged/refs/x", "x");
    assert_eq!(unclean(&tree, &["/etc/.git"]), []);
}

#[test]
fn etckeepers_repository_begins_again() {
    let tree = image();
    git(&tree, "etc", &["init", "-q"]);
    commit(&tree, "etc");
    tree.file("etc/.hg/store", "x");
    let mut removed = RemovedFiles::read(&tree.tree(), &[]).unwrap();
    tree.remove("etc/machine-id");
    let mut unclean = removed.find_repositories(&tree.tree(), &[]).unwrap();
    unclean.push(UncleanRepository { path: "/srv/x/.git".to_owned(), what: String::new() });
    let without = Tree::new();
    let mut same = vec![UncleanRepository { path: "/etc/.git".to_owned(), what: String::new() }];
    assert_eq!(replace_etckeepers(&without.tree(), &mut same).unwrap(), [""; 0]);
    assert_eq!(same.len(), 1, "without etckeeper, the lint reports it");
    let notes = replace_etckeepers(&tree.tree(), &mut unclean).unwrap();
    assert!(
        notes[0].contains("/etc/.git with its history (a repository whose history holds /etc/machine-id")
    );
    assert!(
        notes[1].contains("/etc/.hg with its history (a repository whose history may hold /etc/machine-id")
    );
    assert!(notes.len() == 3 && notes[2].contains(UNIT), "{notes:?}");
    assert_eq!(unclean.iter().map(|left| left.path.as_str()).collect::<Vec<_>>(), ["/srv/x/.git"]);
    assert!(!tree.has("etc/.git") && !tree.has("etc/.hg") && tree.has("etc/hostname"));
    let unit = tree.read("etc/systemd/system/oven-etckeeper.service").unwrap();
    let conditions = "\nConditionPathExists=!/etc/.git\nConditionPathExists=!/etc/.hg\nAfter=";
    assert!(unit.contains(conditions), "{unit}");
    assert!(tree.link_of("etc/systemd/system/multi-user.target.wants/oven-etckeeper.service").is_some());
    assert_eq!(replace_etckeepers(&tree.tree(), &mut unclean).unwrap(), [""; 0]);
}

/// Creates a repository of git without the program. Its history has one file.
fn repository_with(tree: &Tree, path: &str, content: &str) {
    let header = format!("blob {}\0", content.len());
    let id = hex(&sha1::Sha1::new().chain_update(header).chain_update(content).finalize());
    for (name, content) in
        [("HEAD", "ref: refs/heads/main\n"), ("refs/heads/main", "x"), ("config", "[core]\n")]
    {
        tree.file(&format!("{path}/{name}"), content);
    }
    tree.file(&format!("{path}/objects/{}/{}", &id[..2], &id[2..]), "compressed");
}

/// The same with an index of a pack.
fn repository_with_pack(tree: &Tree, path: &str, content: &str) {
    repository_with(tree, path, "another");
    let header = format!("blob {}\0", content.len());
    let id = sha1::Sha1::new().chain_update(header).chain_update(content).finalize();
    let mut index = INDEX_MAGIC.to_vec();
    (0..=255).for_each(|first: u8| index.extend(u32::from(first >= id[0]).to_be_bytes()));
    index.extend(id.as_slice());
    tree.file(&format!("{path}/objects/pack/pack-1.idx"), "");
    std::io::Write::write_all(&mut tree.open(&format!("{path}/objects/pack/pack-1.idx")), &index).unwrap();
}

/// Reads the files, calls `clean`, and returns the paths of the unclean repositories.
fn unclean_after(tree: &Tree, remove: &[&str], clean: &[&str]) -> Vec<String> {
    let remove: Vec<_> = remove.iter().map(|path| (*path).to_owned()).collect();
    let mut removed = RemovedFiles::read(&tree.tree(), &remove).unwrap();
    clean.iter().for_each(|path| tree.remove(path));
    let found = removed.find_repositories(&tree.tree(), &[]).unwrap();
    assert_eq!(removed.limit_warning(), None);
    found.into_iter().map(|found| found.path).collect()
}

#[test]
fn only_files_that_are_gone_or_changed_count() {
    let known = [
        "etc/machine-id",
        "etc/ssh/ssh_host_rsa_key",
        "etc/ssl/private/ssl-cert-snakeoil.key",
        "var/lib/rabbitmq/.erlang.cookie",
        "etc/iscsi/initiatorname.iscsi",
    ];
    for path in known {
        let tree = image();
        let content = format!("the content of {path}\n");
        tree.file(path, &content);
        repository_with(&tree, "srv/code/.git", &content);
        repository_with(&tree, "srv/other.git", "another");
        repository_with_pack(&tree, "srv/pack.git", &content);
        // Kept, exempt, placed by the definition, or made by nothing: the file stays.
        tree.file("etc/.hg/store", "x");
        assert_eq!(unclean_after(&tree, &[], &[]), [""; 0], "{path}");
        let mut expected = vec!["/srv/code/.git", "/srv/pack.git"];
        if path.starts_with("etc/") {
            expected.insert(0, "/etc/.hg");
        }
        assert_eq!(unclean_after(&tree, &[], &[path]), expected, "{path}");
        tree.file(path, &content);
        let mut removed = RemovedFiles::read(&tree.tree(), &[]).unwrap();
        tree.file(path, "");
        assert_eq!(removed.find_repositories(&tree.tree(), &[]).unwrap().len(), expected.len(), "{path}");
    }
    // Templates and files without content are in many repositories.
    for content in ["uninitialized\n", "\n", " \n"] {
        let tree = image();
        tree.file("etc/machine-id", content);
        repository_with(&tree, "srv/code/.git", content);
        assert_eq!(unclean_after(&tree, &[], &["etc/machine-id"]), [""; 0], "{content:?}");
    }
}

#[test]
fn of_the_files_that_remove_names_only_keys_and_secrets_count() {
    for (path, content, is_secret) in [
        ("srv/app/docs/a.md", "# Usage\n", false),
        ("srv/app/empty", "\n", false),
        ("srv/app/main.py", "pass\n", false),
        ("srv/app/notes", KEY, true),
        ("srv/app/api.token", "x1\n", true),
        ("srv/app/settings.ini", "password = AbCdEfGh12\n", true),
    ] {
        // The pattern matches the file, or a directory above it.
        for remove in [&format!("/{path}"), "/srv/app", "/srv/*"] {
            let tree = image();
            tree.file(path, content);
            repository_with(&tree, "opt/code/.git", content);
            let expected: &[&str] = if is_secret { &["/opt/code/.git"] } else { &[] };
            let found = unclean_after(&tree, &[remove], &["srv/app"]);
            assert_eq!(found, expected, "{path}, {remove}");
        }
    }
}

#[test]
fn repositories_of_any_name_are_found() {
    let tree = image();
    for path in ["srv/objects/backup.git", "srv/objects/objects", "srv/a*b/.git", "srv/axb/.git"] {
        repository_with_pack(&tree, path, "host key");
    }
    tree.remove("srv/axb/.git/objects/pack");
    let found = unclean_after(&tree, &[], &["etc/ssh/ssh_host_rsa_key"]);
    assert_eq!(found, ["/srv/a*b/.git", "/srv/objects/backup.git", "/srv/objects/objects"]);
}

#[test]
fn a_search_that_ends_early_is_reported() {
    let check = |limit: &str, fill: &dyn Fn(&Tree)| {
        let tree = image();
        fill(&tree);
        let remove = ["/srv/many".to_owned()];
        let mut removed = RemovedFiles::read(&tree.tree(), &remove).unwrap();
        ["etc/machine-id", "srv/many"].iter().for_each(|path| tree.remove(path));
        removed.find_repositories(&tree.tree(), &[]).unwrap();
        let warning = removed.limit_warning().unwrap();
        assert!(warning.contains(&format!("so many {limit} that")), "{warning}");
    };
    let keys = |tree: &Tree| {
        (0..=FILES_MAX).for_each(|n| tree.file(&format!("srv/many/{n}.key"), "x"));
    };
    check("removed files", &keys);
    check("repositories", &|tree| {
        (0..=REPOSITORIES_MAX).for_each(|n| tree.file(&format!("srv/{n}/.hg/x"), "x"));
    });
    check("packs of git", &|tree| {
        repository_with(tree, "srv/code.git", "x");
        (0..=PACKS_MAX).for_each(|n| tree.file(&format!("srv/code.git/objects/pack/{n}.idx"), "x"));
    });
    check("objects of git", &|tree| {
        repository_with(tree, "etc/code.git", "x");
        (0..=OBJECTS_MAX).for_each(|n| tree.file(&format!("etc/code.git/objects/{}/{n}", n % 100), "x"));
    });
}
