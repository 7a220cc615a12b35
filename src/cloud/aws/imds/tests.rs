use super::*;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

const ID: &str = "i-0123456789abcdef0";

/// How the metadata service handles requests.
#[derive(Clone, Copy)]
enum Manner {
    /// Answers as EC2 does. A request without a token gets the status 401.
    Good { id: &'static str, zone: &'static str },
    /// Answers every request with this status.
    Status(u16),
    /// Accepts the request for a token and never answers.
    Silent,
    /// Behaves like [`GOOD`], but does not answer the first requests. The fields are the number of these requests, and
    /// their HTTP method.
    Late(u32, &'static str),
}

struct Service {
    endpoint: String,
    /// The number of requests that the service received.
    requests: Arc<AtomicU32>,
    task: JoinHandle<()>,
}

impl Drop for Service {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn service(manner: Manner) -> Service {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let requests = Arc::new(AtomicU32::new(0));
    let count = requests.clone();
    let task = tokio::spawn(async move {
        let mut silent = Vec::new();
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                if stream.read(&mut byte).await.unwrap_or(0) == 0 {
                    break;
                }
                request.push(byte[0]);
            }
            let request = String::from_utf8(request).unwrap().to_lowercase();
            let before = count.fetch_add(1, Ordering::Relaxed);
            let manner = match manner {
                // The token is requested only once, by a PUT. This is request 0, so the GETs begin with request 1.
                Manner::Late(lost, "get") if (1..=lost).contains(&before) => Manner::Silent,
                Manner::Late(lost, "put") if before < lost => Manner::Silent,
                Manner::Late(..) => GOOD,
                manner => manner,
            };
            let (status, body) = match manner {
                Manner::Silent | Manner::Late(..) => {
                    silent.push(stream);
                    continue;
                }
                Manner::Status(status) => (status, ""),
                Manner::Good { .. } if request.starts_with("put /latest/api/token ") => (200, "secret"),
                Manner::Good { .. } if !request.contains("x-aws-ec2-metadata-token: secret") => (401, ""),
                Manner::Good { id, .. } if request.starts_with("get /latest/meta-data/instance-id ") => {
                    (200, id)
                }
                Manner::Good { zone, .. }
                    if request.starts_with("get /latest/meta-data/placement/availability-zone ") =>
                {
                    (200, zone)
                }
                Manner::Good { .. } => (404, ""),
            };
            let ttl = "x-aws-ec2-metadata-token-ttl-seconds: 21600";
            let answer = format!(
                "HTTP/1.1 {status} X\r\n{ttl}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    Service { endpoint, requests, task }
}

fn client(endpoint: &str) -> Client {
    // Like the client in `identify_instance`, but with a shorter read timeout and fewer attempts.
    Client::builder()
        .endpoint(endpoint)
        .unwrap()
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(Duration::from_millis(200))
        .operation_timeout(OPERATION_TIMEOUT)
        .max_attempts(2)
        .build()
}

fn given(id: &str, zone: &str, region: &str) -> InstanceOverrides {
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    InstanceOverrides { instance_id: some(id), zone: some(zone), region: some(region) }
}

async fn ask(
    manner: Manner,
    given: InstanceOverrides,
    environment: Option<(String, &str)>,
) -> Result<Instance> {
    let service = service(manner).await;
    identify(given, environment, &client(&service.endpoint)).await
}

fn instance(id: &str, zone: &str, region: &str) -> Instance {
    Instance { id: id.into(), zone: zone.into(), region: region.into() }
}

const GOOD: Manner = Manner::Good { id: ID, zone: "eu-central-1b" };

#[tokio::test]
async fn the_metadata_service_is_queried() {
    let me = ask(GOOD, InstanceOverrides::default(), None).await.unwrap();
    assert_eq!(me, instance(ID, "eu-central-1b", "eu-central-1"));
    let gov = Manner::Good { id: "i-01234567", zone: "us-gov-west-1a" };
    let me = ask(gov, InstanceOverrides::default(), None).await.unwrap();
    assert_eq!(me, instance("i-01234567", "us-gov-west-1a", "us-gov-west-1"));
}

#[tokio::test]
async fn given_values_take_precedence_without_a_query() {
    let other = "i-0aaaaaaaaaaaaaaaa";
    let me = ask(Manner::Status(500), given(other, "us-east-1f", ""), None).await.unwrap();
    assert_eq!(me, instance(other, "us-east-1f", "us-east-1"));
    let me = ask(GOOD, given(other, "", ""), None).await.unwrap();
    assert_eq!(me, instance(other, "eu-central-1b", "eu-central-1"));
    let me = ask(GOOD, given("", "us-east-1f", ""), None).await.unwrap();
    assert_eq!(me, instance(ID, "us-east-1f", "us-east-1"));
}

#[tokio::test]
async fn another_region_is_rejected() {
    let environment = || Some(("us-east-1".to_owned(), "AWS_REGION"));
    for (given, environment, by) in [
        (given("", "", "us-east-1"), None, "--region or oven.toml"),
        (InstanceOverrides::default(), environment(), "AWS_REGION"),
        (given("", "", "us-east-1"), environment(), "--region or oven.toml"),
    ] {
        let error = ask(GOOD, given, environment).await.unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Usage);
        let text = format!("{ID} is in eu-central-1b, but {by} sets the region us-east-1");
        assert_eq!(error.to_string(), text);
    }
    // A flag takes precedence over the environment.
    assert!(ask(GOOD, given("", "", "eu-central-1"), environment()).await.is_ok());
}

#[tokio::test]
async fn wrong_flags_are_named() {
    for (given, expected) in [
        (
            given("i-1", "", ""),
            "`--instance-id` has to be an instance id such as i-0123456789abcdef0, but is \"i-1\"",
        ),
        (given("vol-0123456789abcdef0", "", ""), "`--instance-id` has to be"),
        (given(ID, "EU", ""), "`--zone` has to be"),
        (given(ID, "zone", ""), "`--zone` has to be"),
    ] {
        let error = ask(GOOD, given, None).await.unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Usage);
        assert!(error.to_string().starts_with(expected), "{error}");
    }
}

#[tokio::test]
async fn unsupported_zones_are_rejected() {
    let zones = [
        "us-west-2-lax-1a",
        "us-east-1-wl1-bos-wlz-1",
        "euc1-az1",
        "eu-central-1",
        "eu-central-a",
        "eu-1a",
        "-1a",
    ];
    for zone in zones {
        let error = ask(GOOD, given(ID, zone, ""), None).await.unwrap_err();
        assert_eq!(error.to_string(), format!("{zone} is not an availability zone"));
    }
}

/// The metadata service of a busy builder may answer late.
#[tokio::test]
async fn lost_answers_are_asked_for_again() {
    for (lost, method) in [(1, "put"), (LOST_ANSWERS - 1, "put"), (1, "get"), (LOST_ANSWERS - 1, "get")] {
        let service = service(Manner::Late(lost, method)).await;
        let me = identify(InstanceOverrides::default(), None, &client(&service.endpoint)).await.unwrap();
        assert_eq!(me, instance(ID, "eu-central-1b", "eu-central-1"));
        // Three requests are answered: for the token, the id and the zone.
        assert_eq!(service.requests.load(Ordering::Relaxed), lost + 3);
    }
}

#[tokio::test]
async fn only_silence_is_waited_out() {
    for (manner, tries) in
        [(Manner::Silent, LOST_ANSWERS), (Manner::Status(403), 1), (Manner::Status(400), 1)]
    {
        let service = service(manner).await;
        identify(InstanceOverrides::default(), None, &client(&service.endpoint)).await.unwrap_err();
        assert_eq!(service.requests.load(Ordering::Relaxed), tries);
    }
}

#[tokio::test]
async fn each_failure_is_explained() {
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let refused =
        identify(InstanceOverrides::default(), None, &client(&format!("http://{closed}"))).await.unwrap_err();
    let cases = [
        (refused, "the metadata service cannot be reached: ", "AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE=IPv6"),
        (
            ask(Manner::Status(403), InstanceOverrides::default(), None).await.unwrap_err(),
            "the metadata service is turned off",
            "--http-endpoint enabled",
        ),
        (
            ask(Manner::Silent, InstanceOverrides::default(), None).await.unwrap_err(),
            "the metadata service accepts a request for a token, but its response does not arrive",
            "--http-put-response-hop-limit 2",
        ),
        (
            ask(Manner::Good { id: "<html>sorry</html>", zone: "" }, InstanceOverrides::default(), None)
                .await
                .unwrap_err(),
            "the metadata service returned \"<html>sorry</html>\" for /latest/meta-data/instance-id",
            "--instance-id",
        ),
    ];
    for (error, text, hint) in cases {
        assert_eq!(Kind::of(&error), Kind::Machine);
        assert!(error.to_string().starts_with(text), "{error}");
        let hints = crate::error::hint_of(&error).unwrap();
        assert!(hints.contains(hint) && hints.contains("--instance-id and --zone"), "{hints}");
    }
}
