//! The clean-up rules: the paths of machine-specific data, each with a description. [`super::clean`] removes the data,
//! and [`super::lint`] checks that no such data remains. The caches of package managers are not listed here. A
//! distribution's plan lists them, and the plan's clean-up steps empty them.

use crate::image::accounts::{Accounts, HOMES_MAX};
use crate::image::tree::ImageTree;
use crate::text::match_wildcards;
use anyhow::Result;
use rustix::fs::FileType;
use std::collections::{BTreeSet, HashSet};

/// Files that are removed. `*` matches any characters within one name.
pub const FILES: &[(&str, &str)] = &[
    ("/var/lib/dbus/machine-id", "a machine id"),
    ("/var/lib/systemd/random-seed", "a random seed"),
    ("/var/lib/urandom/random-seed", "a random seed"),
    ("/var/lib/random-seed", "a random seed"),
    ("/boot/loader/random-seed", "a random seed"),
    ("/var/lib/systemd/credential.secret", "a key for credentials"),
    ("/var/lib/dhcp/*.leases", "a lease of an address"),
    ("/var/lib/dhclient/*.lease*", "a lease of an address"),
    ("/var/lib/dhcpcd/*.lease*", "a lease of an address"),
    ("/var/lib/dhcpcd5/*.lease*", "a lease of an address"),
    ("/var/lib/dhcpcd/duid", "a machine's id for leases"),
    ("/var/lib/dhcpcd/secret", "a machine's secret for addresses"),
    ("/etc/dhcpcd.duid", "a machine's id for leases"),
    ("/etc/dhcpcd.secret", "a machine's secret for addresses"),
    ("/var/lib/NetworkManager/*.lease", "a lease of an address"),
    ("/var/lib/NetworkManager/secret_key", "a machine's secret for addresses"),
    ("/var/lib/NetworkManager/timestamps", "a machine's past connections"),
    // cloud-init makes this a symlink to the instance's directory. If it is a directory, it is emptied instead (see
    // `DIRECTORIES`).
    ("/var/lib/cloud/instance", "the state of an instance"),
];

/// Directories that are emptied. The directories themselves remain, with their owner and mode.
pub const DIRECTORIES: &[(&str, &str)] = &[
    ("/tmp", "a temporary file"),
    ("/var/tmp", "a temporary file"),
    ("/root/.cache", "a cache"),
    // cloud-init's seed and scripts are not removed, because they belong to the image. A directory that is missing is
    // not created, because cloud-init of Amazon Linux 2023 fails if `instance` is a directory.
    ("/var/lib/cloud/data", "the state of an instance"),
    ("/var/lib/cloud/instance", "the state of an instance"),
    ("/var/lib/cloud/instances", "the state of an instance"),
    ("/var/lib/cloud/sem", "the state of an instance"),
    ("/var/lib/systemd/coredump", "a crashed program's memory"),
    ("/var/crash", "a crashed program's memory"),
    ("/var/log/journal", "a journal"),
];

pub const LOGS: &str = "/var/log";
pub const MACHINE_ID: &str = "/etc/machine-id";
pub const HOST_KEYS: &str = "/etc/ssh/ssh_host_*_key";
pub const SNAKEOIL: &str = "/etc/ssl/private/ssl-cert-snakeoil.key";

/// A path at which a program stores private keys or credentials. The lint rejects such a file if the bake added it.
#[derive(Debug)]
pub struct CredentialRule {
    /// An absolute path, or a path in a home directory. `*` matches any characters within one name.
    pub path: &'static str,
    /// The end of the names that the rule does not cover.
    pub except: Option<&'static str>,
    /// The rule covers only files that contain one of these texts. If there is none, it covers all files that are not
    /// empty.
    pub contains: &'static [&'static str],
    pub what: &'static str,
}

const fn credential(path: &'static str, what: &'static str) -> CredentialRule {
    CredentialRule { path, except: None, contains: &[], what }
}

const fn setting(
    path: &'static str,
    contains: &'static [&'static str],
    what: &'static str,
) -> CredentialRule {
    CredentialRule { path, except: None, contains, what }
}

const AWS: &str = "credentials for AWS";
const REGISTRY: &str = "credentials for a registry of containers";
const GOOGLE: &str = "credentials for Google Cloud";
const AZURE: &str = "credentials for Azure";
const GIT: &str = "credentials for git";
const DATABASE: &str = "a password for a database";
const PACKAGES: &str = "a token for a registry of packages";

/// Private keys and credentials. The searched homes are those of all accounts, `/root`, and the directories in `/home`.
pub const CREDENTIALS: &[CredentialRule] = &[
    CredentialRule { path: ".ssh/id_*", except: Some(".pub"), contains: &[], what: "a private SSH key" },
    credential(".ssh/authorized_keys", "a key that could log in to every instance"),
    credential(".ssh/authorized_keys2", "a key that could log in to every instance"),
    credential(".gnupg/private-keys-v1.d/*.key", "a private GnuPG key"),
    credential(".gnupg/secring.gpg", "a private GnuPG key"),
    credential(".aws/credentials", AWS),
    setting(".aws/config", &["aws_secret_access_key", "aws_session_token"], AWS),
    credential(".aws/cli/cache/*", AWS),
    credential(".aws/sso/cache/*", AWS),
    setting(".boto", &["secret_access_key", "refresh_token"], "credentials for a cloud"),
    setting("/etc/boto.cfg", &["secret_access_key", "refresh_token"], "credentials for a cloud"),
    setting(".s3cfg", &["secret_key"], AWS),
    credential(".passwd-s3fs", AWS),
    credential("/etc/passwd-s3fs", AWS),
    credential(".config/gcloud/application_default_credentials.json", GOOGLE),
    credential(".config/gcloud/credentials.db", GOOGLE),
    credential(".config/gcloud/access_tokens.db", GOOGLE),
    credential(".azure/accessTokens.json", AZURE),
    credential(".azure/msal_token_cache.*", AZURE),
    credential(".azure/service_principal_entries.*", AZURE),
    setting(".docker/config.json", &["\"auth\"", "\"identitytoken\"", "\"registrytoken\""], REGISTRY),
    credential(".dockercfg", REGISTRY),
    credential(".config/containers/auth.json", REGISTRY),
    credential(".kube/config", "credentials for Kubernetes"),
    credential(".netrc", "passwords for servers"),
    credential(".git-credentials", GIT),
    credential(".config/git/credentials", GIT),
    setting(".config/gh/hosts.yml", &["oauth_token"], "a token for GitHub"),
    setting(".config/glab-cli/config.yml", &["token: "], "a token for GitLab"),
    credential(".pgpass", DATABASE),
    credential(".mylogin.cnf", DATABASE),
    setting(".my.cnf", &["password"], DATABASE),
    setting(".npmrc", &["_authToken", "_auth", "_password"], PACKAGES),
    setting(".yarnrc.yml", &["npmAuthToken", "npmAuthIdent"], PACKAGES),
    setting(".pypirc", &["password"], PACKAGES),
    credential(".cargo/credentials", PACKAGES),
    credential(".cargo/credentials.toml", PACKAGES),
    credential(".gem/credentials", PACKAGES),
    setting(".composer/auth.json", &["\"password\"", "token", "\"github-oauth\""], PACKAGES),
    setting(".m2/settings.xml", &["<password>"], PACKAGES),
    credential(".vault-token", "a token for Vault"),
    credential(".terraform.d/credentials.tfrc.json", "a token for Terraform"),
    setting(".config/rclone/rclone.conf", &["secret", "token", "pass"], "credentials for a cloud"),
    credential("/etc/krb5.keytab", "a machine's Kerberos key"),
    setting("/etc/wireguard/*.conf", &["PrivateKey", "PresharedKey"], "a private WireGuard key"),
    setting(
        "/etc/NetworkManager/system-connections/*",
        &["psk=", "password=", "private-key="],
        "a password for a network",
    ),
];

/// The maximum size in bytes of the paths of all home directories. 50,000 usual paths have 1 MiB. The time for a home
/// depends on the length of its path, because oven looks for many files in each home.
const HOME_PATHS_MAX: usize = 2 << 20;

/// Histories of shells and clients in a home directory.
const HISTORIES: [&str; 4] = [".*history", ".lesshst", ".viminfo", ".wget-hsts"];

/// Returns whether `[clean] keep` contains a path, or a directory above it.
pub fn is_excluded(keep: &[String], path: &str) -> bool {
    keep.iter().any(|entry| {
        let mut entry = entry.trim_end_matches('/').split('/');
        let mut path = path.split('/');
        entry.all(|pattern| path.next().is_some_and(|name| match_wildcards(pattern, name).is_some()))
    })
}

/// Returns the home directories of all accounts and of root, and the directories in /home. Each existing directory is
/// returned once, although accounts may spell it in different ways. A path through a symlink counts as missing.
pub fn homes(inside: &ImageTree) -> Result<Vec<String>> {
    let too_many =
        || inside.meter().exceeded(format!("the image has more than {HOMES_MAX} home directories"));
    let of_accounts = Accounts::read(inside)?.homes().ok_or_else(too_many)?;
    let mut paths: BTreeSet<_> = of_accounts.iter().map(|home| normalize(home)).collect();
    paths.insert("/root".to_owned());
    paths.extend(inside.expand("/home/*")?.into_iter().map(|(path, _)| path));
    if paths.len() > HOMES_MAX {
        return Err(too_many());
    }
    if paths.iter().map(String::len).sum::<usize>() > HOME_PATHS_MAX {
        let max = HOME_PATHS_MAX >> 20;
        let what = format!("the paths of the image's home directories have more than {max} MiB together");
        return Err(inside.meter().exceeded(what));
    }
    let (mut homes, mut ids) = (Vec::new(), HashSet::new());
    for path in paths {
        if inside.directory_id(&path)?.is_some_and(|id| ids.insert(id)) {
            homes.push(path);
        }
    }
    Ok(homes)
}

/// Resolves the empty components, `.` and `..` of an absolute path.
fn normalize(path: &str) -> String {
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => _ = parts.pop(),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

/// Visits the history files in the home directories.
pub fn visit_histories(inside: &ImageTree, visit: &mut dyn FnMut(&str) -> Result<()>) -> Result<()> {
    for home in homes(inside)? {
        for pattern in HISTORIES {
            for (path, kind) in inside.expand(&format!("{}/{pattern}", home.trim_end_matches('/')))? {
                if kind != FileType::Directory {
                    visit(&path)?;
                }
            }
        }
    }
    Ok(())
}

/// Returns whether a log's name is that of a rotated log, such as `syslog.1`. Rotated logs are removed. Current logs
/// are emptied.
pub fn is_rotated(name: &str) -> bool {
    let compressed = [".gz", ".xz", ".bz2", ".zst", ".old"].iter().any(|end| name.ends_with(end));
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    compressed
        || name.rsplit_once('.').is_some_and(|(_, end)| number(end) && end.len() < 4)
        || name.rsplit_once('-').is_some_and(|(_, end)| number(end) && end.len() == 8)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test::Tree;

    #[test]
    fn a_home_in_many_spellings_is_one_home() {
        let tree = Tree::new();
        tree.file("home/x/.bash_history", "");
        tree.file("srv/app/.bash_history", "");
        tree.link("/home/x", "link");
        let more: String = (0..50).map(|n| format!("x:x:1:1::/home{}/x:\n", "/.".repeat(n))).collect();
        let others = ["/home//x/", "/../home/x", "/home/y/../x", "/link", "/srv/app", "/none", "none"];
        let others: String = others.iter().map(|home| format!("x:x:1:1::{home}:\n")).collect();
        let long = format!("x:x:1:1::/{}:\n", "x/".repeat(10_000));
        tree.file("etc/passwd", &(more + &others + &long));
        assert_eq!(homes(&tree.tree()).unwrap(), ["/home/x", "/srv/app"]);
        let mut found = Vec::new();
        let visited = visit_histories(&tree.tree(), &mut |path| {
            found.push(path.to_owned());
            Ok(())
        });
        visited.unwrap();
        assert_eq!(found, ["/home/x/.bash_history", "/srv/app/.bash_history"]);
    }

    #[test]
    fn the_paths_of_homes_have_a_limit_in_bytes() {
        let tree = Tree::new();
        let homes =
            |count| (0..count).map(|n| format!("x:x:1:1::/{n}{}:\n", "/x".repeat(2000))).collect::<String>();
        tree.file("etc/passwd", &homes(500));
        assert!(homes_of(&tree).unwrap().is_empty());
        tree.file("etc/passwd", &homes(600));
        let error = homes_of(&tree).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the paths of the image's home directories have more than 2 MiB together"
        );
    }

    fn homes_of(tree: &Tree) -> Result<Vec<String>> {
        homes(&tree.tree())
    }

    #[test]
    fn keep_covers_paths_and_patterns() {
        let keep = ["/var/log/app/".to_owned(), "/etc/ssh/ssh_host_*_key".to_owned()];
        for path in ["/var/log/app", "/var/log/app/x/y", "/etc/ssh/ssh_host_rsa_key"] {
            assert!(is_excluded(&keep, path), "{path}");
        }
        for path in ["/var/log", "/var/log/apparmor", "/etc/ssh/ssh_host_rsa_key.pub", "/"] {
            assert!(!is_excluded(&keep, path), "{path}");
        }
        assert!(!is_excluded(&[], "/"));
    }

    #[test]
    fn rotated_logs() {
        for name in ["syslog.1", "dpkg.log.2.gz", "x.old", "cron-20240101", "eipp.log.xz"] {
            assert!(is_rotated(name), "{name}");
        }
        for name in ["syslog", "auth.log", "postgresql-15-main.log", "2024", "app.2024", "wtmp", "a-1"] {
            assert!(!is_rotated(name), "{name}");
        }
    }
}
