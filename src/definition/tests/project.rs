//! A definition can use only the files of its project.

use super::*;

#[test]
fn a_linked_file_counts_with_its_bytes_so_it_may_lead_out() {
    let top = tree();
    let web = load(top.path(), "from = \"ami-01234567\"\n[[run]]\nscript = \"linked.sh\"\n").unwrap();
    assert_eq!(web.runs[0].program, Program::Script("linked.sh".into()));
}

#[test]
fn nothing_leads_out_of_the_project() {
    let top = tree();
    let real = top.path().canonicalize().unwrap();
    let passwd = "web/passwd";
    symlink("/etc/passwd", top.path().join(passwd)).unwrap();
    symlink("/etc", top.path().join("host")).unwrap();
    let up = "../".repeat(real.components().count());
    let cases = [
        (
            "[[file]]\nsource = \"passwd\"\ntarget = \"/x\"".to_owned(),
            "\"passwd\", which resolves to /etc/passwd, outside",
        ),
        (format!("inputs = [\"{up}etc\"]"), "which resolves to /etc, outside the project DIR"),
        ("inputs = [\"../host\"]".to_owned(), "\"../host\", which resolves to /etc, outside the project DIR"),
    ];
    for (toml, expected) in cases {
        let error = load(top.path(), &format!("from = \"ami-01234567\"\n{toml}\n")).unwrap_err();
        assert!(error.contains(expected), "{toml}\ngives {error}");
    }
    // A file of git may contain credentials.
    std::fs::create_dir_all(top.path().join("web/sub/.git/hooks")).unwrap();
    std::fs::write(top.path().join("web/sub/.git/hooks/x.sh"), "#!/bin/sh\n").unwrap();
    symlink("sub/.git/hooks/x.sh", top.path().join("web/x.sh")).unwrap();
    std::fs::create_dir(top.path().join(".git")).unwrap();
    for toml in [
        "[[file]]\nsource = \"x.sh\"\ntarget = \"/x\"",
        "[[file]]\nsource = \"sub/.git/hooks/x.sh\"\ntarget = \"/x\"\ntemplate = true",
        "[[run]]\nscript = \"x.sh\"",
        "[[test]]\nbats = \"x.sh\"",
        "[[ansible]]\nplaybook = \"x.sh\"",
        "packages = [\"./x.sh\"]",
        "[[repository]]\nname = \"r\"\nurl = \"https://r.example\"\nsuite = \"x\"\nkey = \"x.sh\"",
        "inputs = [\"../.git\"]",
    ] {
        let error = load(top.path(), &format!("from = \"ami-01234567\"\n{toml}\n")).unwrap_err();
        assert!(error.contains("is inside a .git"), "{toml}\ngives {error}");
    }
    std::fs::remove_dir(top.path().join(".git")).unwrap();
    // The three possible projects: the definition's directory if it is a git repository, a directory above it with an
    // oven.toml, or else its parent directory.
    let toml = "from = \"ami-01234567\"\ninputs = [\"../common\"]\n";
    assert_eq!(load(top.path(), toml).unwrap().project, real);
    std::fs::create_dir(top.path().join("web/.git")).unwrap();
    let error = load(top.path(), toml).unwrap_err();
    assert!(error.contains("outside the project DIR/web ("), "{error}");
    // In a worktree and in a submodule, `.git` is a file.
    std::fs::remove_dir(top.path().join("web/.git")).unwrap();
    std::fs::write(top.path().join("web/.git"), "gitdir: /srv/repo/.git/worktrees/web\n").unwrap();
    let error = load(top.path(), toml).unwrap_err();
    assert!(error.contains("outside the project DIR/web ("), "{error}");
    assert_eq!(paths::project(&real.join("a/b/c")), real.join("a/b"));
    std::fs::write(top.path().join("oven.toml"), "").unwrap();
    assert_eq!(paths::project(&real.join("a/b/c")), real);
}
