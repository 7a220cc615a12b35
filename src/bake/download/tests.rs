use super::*;
use crate::formats::package::fixture;
use crate::provision::test::definition;
use crate::report::{Level, Style};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;

const CONTROL: &str = "Package: site\nVersion: 1.0\nArchitecture: all\n";

/// Starts a server that gives these answers, one for each connection, and then ends. The thread returns the requests.
fn server(answers: Vec<Vec<u8>>) -> (String, std::thread::JoinHandle<Vec<String>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let thread = std::thread::spawn(move || {
        let serve = |answer: Vec<u8>| {
            let (mut stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            let lines: Vec<_> = lines.map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
            stream.write_all(&answer).unwrap();
            lines[0].clone()
        };
        answers.into_iter().map(serve).collect()
    });
    (address, thread)
}

fn answer(status: &str, length: usize, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    [head.as_bytes(), body].concat()
}

fn good() -> (Vec<u8>, String) {
    let deb = fixture::deb(CONTROL, ".gz");
    let digest = hex(&Sha256::digest(&deb));
    (deb, digest)
}

/// Downloads one package, without pauses. Returns the result, and the files in the directory.
fn run(
    url: &str,
    sha256: &str,
    network: &NetworkSettings,
) -> (Result<Definition, (Kind, String)>, Vec<String>) {
    let dir = tempfile::tempdir().unwrap();
    let image = definition(dir.path(), |image| {
        image.packages =
            vec![PackageRequest::Url { url: url.to_owned(), sha256: sha256.to_owned(), file: None }];
    });
    let downloads = dir.path().join(DIR);
    let report = Report::new(Style::Silent, Level::Quiet);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let done = runtime.block_on(fetch_packages(&image, &downloads, network, &report));
    let left = std::fs::read_dir(downloads.join(sha256)).into_iter().flatten();
    let left = left.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    (done.map_err(|error| (Kind::of(&error), format!("{error:#}"))), left)
}

fn no_proxy() -> NetworkSettings {
    NetworkSettings::default()
}

#[test]
fn only_a_file_with_the_digest_is_accepted() {
    let (deb, digest) = good();
    let (at, server) = server(vec![answer("200 OK", deb.len(), &deb), answer("200 OK", 3, b"abc")]);
    let (done, left) = run(&format!("http://{at}/pool/site_1.0_all.deb?x=y"), &digest, &no_proxy());
    let image = done.unwrap();
    let PackageRequest::Url { file: Some(file), .. } = &image.packages[0] else {
        panic!("{:?}", image.packages)
    };
    assert_eq!((&*file.package.name, &*file.package.sha256), ("site", &*digest));
    assert_eq!(left, ["site_1.0_all.deb"]);

    let (done, left) = run(&format!("http://{at}/b.deb"), &digest, &no_proxy());
    let (kind, text) = done.unwrap_err();
    assert_eq!(kind, Kind::Definition);
    let other = hex(&Sha256::digest(b"abc"));
    assert!(text.contains(&format!("its sha256 is {other}, not {digest}")), "{text}");
    assert_eq!(left, [""; 0]);
    assert_eq!(server.join().unwrap().len(), 2);
}

#[test]
fn temporary_errors_are_retried_and_others_are_reported() {
    let (deb, digest) = good();
    // The first answer is cut off, the second is an error, and the third is complete.
    let (at, served) = server(vec![
        answer("200 OK", deb.len() + 9, &deb),
        answer("503 No", 0, b""),
        answer("200 OK", deb.len(), &deb),
    ]);
    assert!(run(&format!("http://{at}/a.deb"), &digest, &no_proxy()).0.is_ok());
    assert_eq!(served.join().unwrap().len(), 3);

    for (status, words) in [("404 No", "there is nothing at this address"), ("403 No", "access is denied")] {
        let (at, served) = server(vec![answer(status, 0, b"")]);
        let (kind, text) = run(&format!("http://{at}/a.deb"), &digest, &no_proxy()).0.unwrap_err();
        assert!(kind == Kind::Definition && text.contains(words), "{text}");
        assert_eq!(served.join().unwrap().len(), 1, "{status} is not retried");
    }
}

#[test]
fn a_file_that_is_no_package_is_an_error() {
    let digest = hex(&Sha256::digest(b"<html>"));
    let (at, served) = server(vec![answer("200 OK", 6, b"<html>")]);
    let (done, left) = run(&format!("http://{at}/a.deb"), &digest, &no_proxy());
    let (kind, text) = done.unwrap_err();
    assert!(kind == Kind::Definition && text.contains("it is neither a Debian nor an rpm package"), "{text}");
    assert_eq!(left, [""; 0]);
    served.join().unwrap();
}

#[test]
fn the_proxy_of_the_settings_is_used_except_for_its_exceptions() {
    let (deb, digest) = good();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    let body = deb.clone();
    let proxy = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
        let mut head =
            || lines.by_ref().take_while(|line| !line.is_empty()).collect::<Vec<_>>().swap_remove(0);
        let connect = head();
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
        let get = head();
        stream.write_all(&answer("200 OK", body.len(), &body)).unwrap();
        [connect, get]
    });
    let mut network = NetworkSettings { proxy: Some(format!("http://{at}")), ..NetworkSettings::default() };
    assert!(run("http://nowhere.invalid/a.deb", &digest, &network).0.is_ok());
    assert_eq!(proxy.join().unwrap(), ["CONNECT nowhere.invalid:80 HTTP/1.1", "GET /a.deb HTTP/1.1"]);

    let (at, served) = server(vec![answer("200 OK", deb.len(), &deb)]);
    network.proxy = Some("http://127.0.0.1:9".into());
    network.no_proxy = Some("example.org,127.0.0.1".into());
    assert!(run(&format!("http://{at}/a.deb"), &digest, &network).0.is_ok());
    assert_eq!(served.join().unwrap(), ["GET /a.deb HTTP/1.1"]);
}

#[test]
fn exceptions_include_subdomains() {
    let network = NetworkSettings {
        proxy: Some("socks5h://p.example:1080".into()),
        no_proxy: Some("example.org, .internal,*.lan".into()),
        ..NetworkSettings::default()
    };
    let proxy = proxy(&network).unwrap().unwrap();
    let without = |host: &str| proxy.is_no_proxy(&format!("http://{host}/").parse().unwrap());
    assert!(
        without("example.org") && without("a.example.org") && without("a.internal") && without("a.b.lan")
    );
    assert!(!without("example.com") && !without("notexample.org"));
}

#[test]
fn a_ca_file_without_certificates_is_an_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&file, "no certificate\n").unwrap();
    let network = NetworkSettings { ca_file: Some(file.path().into()), ..NetworkSettings::default() };
    let (kind, text) = run("https://nowhere.invalid/a.deb", "0", &network).0.unwrap_err();
    assert!(kind == Kind::Definition && text.contains("contains no PEM certificate"), "{text}");
}

#[test]
fn names_of_files_have_the_kinds_ending() {
    for (url, name) in [
        ("https://x/a_1.0_all.deb", "a_1.0_all.deb"),
        ("https://x/a.rpm?token=1", "a.rpm"),
        ("https://x/download?id=7", "package.deb"),
        ("https://x/rpm/latest", "package.rpm"),
        ("https://x", "package.deb"),
    ] {
        assert_eq!(file_name(url), name, "{url}");
    }
}
