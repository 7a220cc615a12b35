//! Prepares the settings of `[network]` in oven.toml for fetch steps. Fetch steps are the steps that download packages.
//! Other steps do not see the settings. Fetch steps run no code of packages. So code of packages cannot copy a setting
//! to the image.

use crate::config::project::NetworkSettings;
use crate::error::Kind;
use crate::image::tree::ImageTree;
use anyhow::Result;
use oven_distro::Shim;
use std::collections::BTreeMap;
use std::io::Read;

/// The path at which a fetch step sees the certificates that it trusts. They are the image's own certificates and those
/// of `ca_file`.
pub const CA_FILE: &str = "/run/oven/ca.pem";

/// The maximum size of `ca_file`. Distributions' own bundles are below 1 MiB.
const CA_FILE_MAX: u64 = 16 << 20;

/// The files in which distributions store the certificates that they trust.
const BUNDLES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// The environment variables that contain the path of the certificates' file. Different programs read different
/// variables.
const CA_VARIABLES: [&str; 2] = [
    "SSL_CERT_FILE",  // OpenSSL
    "CURL_CA_BUNDLE", // curl
];

/// Returns the environment variables of a fetch step: the proxies, each in lower and upper case, and the certificates'
/// path.
pub fn environment(settings: &NetworkSettings, certificates: bool) -> BTreeMap<String, String> {
    let mut environment = BTreeMap::new();
    let mut set_in_both_cases = |name: &str, value: &Option<String>| {
        if let Some(value) = value {
            environment.insert(name.to_owned(), value.clone());
            environment.insert(name.to_ascii_uppercase(), value.clone());
        }
    };
    set_in_both_cases("http_proxy", &settings.proxy);
    set_in_both_cases("https_proxy", &settings.proxy);
    set_in_both_cases("no_proxy", &settings.no_proxy);
    if certificates {
        environment.extend(CA_VARIABLES.map(|name| (name.to_owned(), CA_FILE.to_owned())));
    }
    environment
}

/// Returns the certificates in a text. All other content, such as private keys, is removed, because programs of the
/// image see the result. oven.toml may name a secret file by mistake, and oven can read every file because it runs as
/// root.
fn certificate_blocks(text: &str) -> String {
    let mut found = String::new();
    let mut in_certificate = false;
    for line in text.lines().map(str::trim_end) {
        in_certificate |= line == "-----BEGIN CERTIFICATE-----";
        if in_certificate {
            found += line;
            found.push('\n');
        }
        in_certificate &= line != "-----END CERTIFICATE-----";
    }
    found
}

/// Returns a shim with all certificates that fetch steps trust. A shim is a file that only steps see. Returns `None` if
/// oven.toml has no `ca_file`.
///
/// Errors: `ca_file` cannot be read, or has no certificate.
pub fn certificates(settings: &NetworkSettings, inside: &ImageTree) -> Result<Option<Shim>> {
    let Some(path) = &settings.ca_file else { return Ok(None) };
    let invalid =
        |what: String| Kind::Definition.error(format!("oven.toml: `ca_file` {} {what}", path.display()));
    let file = std::fs::File::open(path);
    let mut text = Vec::new();
    let read = file.and_then(|file| file.take(CA_FILE_MAX).read_to_end(&mut text));
    read.map_err(|error| invalid(format!("cannot be read: {error}")))?;
    let added = certificate_blocks(&String::from_utf8_lossy(&text));
    if added.is_empty() {
        return Err(invalid("has no PEM certificate".to_owned()));
    }
    let mut content = String::new();
    for bundle in BUNDLES {
        if let Some(own) = inside.read(bundle)? {
            content += &String::from_utf8_lossy(&own);
            break;
        }
    }
    if !content.is_empty() && !content.ends_with('\n') {
        content.push('\n');
    }
    content += &added;
    Ok(Some(Shim { path: CA_FILE.to_owned(), content, mode: 0o644 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test::Tree;

    #[test]
    fn proxy_variables_are_set_in_both_cases() {
        let settings = NetworkSettings { proxy: Some("http://p:1".into()), ..NetworkSettings::default() };
        let names: Vec<_> = environment(&settings, false).into_keys().collect();
        assert_eq!(names, ["HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "https_proxy"]);
        assert_eq!(environment(&NetworkSettings::default(), false), BTreeMap::new());
        assert_eq!(environment(&settings, true)["SSL_CERT_FILE"], CA_FILE);
    }

    #[test]
    fn certificates_come_after_the_images_own() {
        let tree = Tree::new();
        tree.file("etc/ssl/certs/ca-certificates.crt", "own");
        let file = tempfile::NamedTempFile::new().unwrap();
        let pem = |what: &str| format!("-----BEGIN {what}-----\nMIIB\n-----END {what}-----\n");
        let (one, key) = (pem("CERTIFICATE"), pem("PRIVATE KEY"));
        std::fs::write(&file, format!("subject=x\n{one}{key}{}tail", one.replace('\n', "\r\n"))).unwrap();
        let mut settings =
            NetworkSettings { ca_file: Some(file.path().into()), ..NetworkSettings::default() };
        assert_eq!(
            certificates(&settings, &tree.tree()).unwrap().unwrap().content,
            format!("own\n{one}{one}")
        );
        std::fs::write(&file, "root:x:0:0\n").unwrap();
        let error = certificates(&settings, &tree.tree()).unwrap_err();
        assert!(error.to_string().ends_with("has no PEM certificate"), "{error}");
        settings.ca_file = Some("/nowhere/ca.pem".into());
        let error = certificates(&settings, &tree.tree()).unwrap_err();
        assert!(error.to_string().contains("/nowhere/ca.pem"));
        assert_eq!(certificates(&NetworkSettings::default(), &tree.tree()).unwrap(), None);
    }
}
