//! Keys, tokens, scopes and limits.

use std::path::Path;

use jsonwebtoken::jwk::{Jwk, JwkSet};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use serde_json::{Value, json};

use super::*;
use crate::ledger::{Durability, Entry, Receipt};

fn clients(text: &str) -> Vec<ClientConfig> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clients.toml");
    std::fs::write(&path, text).unwrap();
    read_clients(&path).unwrap()
}

/// A client with a key.
fn client(name: &str, more: &str) -> (String, String) {
    let key = Key::new().unwrap();
    (format!("[[client]]\nname = \"{name}\"\nkey_sha256 = [\"{}\"]\n{more}\n", key.sha256), key.secret)
}

fn bearer(key: &str) -> Option<String> {
    Some(format!("Bearer {key}"))
}

#[test]
fn without_clients_everybody_may_do_all_but_administer() {
    let access = Access::new(Vec::new(), None).unwrap();
    for header in [None, Some("Bearer none")] {
        let caller = access.check(header, None).unwrap();
        assert_eq!(caller.client().name(), "anonymous");
        caller.require(Scope::Generate).unwrap();
        caller.require_model("any").unwrap();
        assert_eq!(caller.require(Scope::Admin).unwrap_err().status(), 403);
        drop(caller.admit().unwrap());
    }
}

#[test]
fn a_key_is_a_client_and_nothing_else_is() {
    let (ada, ada_key) = client("ada", "models = [\"small\"]\nscopes = [\"generate\"]");
    let (bob, bob_key) = client("bob", "adapters = [\"*\"]");
    let access = Access::new(clients(&format!("{ada}{bob}")), None).unwrap();
    assert!(ada_key.starts_with("hal_") && ada_key.len() == 68 && ada_key != bob_key);

    let caller = access.check(bearer(&ada_key).as_deref(), None).unwrap();
    assert_eq!(caller.client().name(), "ada");
    assert!(matches!(caller.require(Scope::Embed), Err(Denied::Scope { .. })));
    caller.require_model("small").unwrap();
    assert!(caller.require_model("large").is_err() && caller.require_adapter("x").is_err());
    let caller = access.check(Some(&format!("bearer  {bob_key} ")), None).unwrap();
    assert_eq!(caller.client().name(), "bob");
    caller.require_model("large").unwrap();
    caller.require_adapter("x").unwrap();

    // A certificate does the same, and is no way around the key of another.
    let certificate = Certificate::of(b"bob's");
    let with_certificate = format!("{bob}certificate_sha256 = [\"{}\"]", certificate.0.to_uppercase());
    access.reload(clients(&format!("{ada}{with_certificate}")), None).unwrap();
    for key in [None, bearer(&bob_key)] {
        assert_eq!(access.check(key.as_deref(), Some(&certificate)).unwrap().client().name(), "bob");
    }
    let other = access.check(bearer(&ada_key).as_deref(), Some(&certificate)).unwrap_err();
    assert_eq!((&other, other.status()), (&Denied::OtherClient, 401));
    let nobody = Certificate::of(b"nobody's");
    let unknown = access.check(None, Some(&nobody)).unwrap_err();
    assert_eq!((&unknown, unknown.status()), (&Denied::UnknownCertificate(nobody.0.clone()), 401));
    assert_eq!(access.check(bearer(&ada_key).as_deref(), Some(&nobody)).unwrap().client().name(), "ada");

    let unknown = Key::new().unwrap().secret;
    for (header, denied) in [
        (None, Denied::NoKey),
        (Some("Basic abc".to_owned()), Denied::NoKey),
        (Some(ada_key.clone()), Denied::NoKey),
        (bearer(&unknown), Denied::UnknownKey),
        (bearer(&ada_key[..67]), Denied::UnknownKey),
        (bearer(&key::sha256(&ada_key)), Denied::UnknownKey),
        (bearer(&"x".repeat(1 << 20)), Denied::UnknownKey),
    ] {
        let got = access.check(header.as_deref(), None).unwrap_err();
        assert_eq!((&got, got.status()), (&denied, 401));
    }
}

#[test]
fn wrong_configurations_are_named() {
    let (ada, _) = client("ada", "");
    for (text, why) in [
        (format!("{ada}{ada}"), "listed twice"),
        ("[[client]]\nname = 'a'\n[[client]]\nname = 'a'".into(), "this name"),
        ("[[client]]\nname = ''".into(), "a name of"),
        ("[[client]]\nname = 'a'\nkey_sha256 = ['hal_1']".into(), "64 hexadecimal"),
        (format!("[[client]]\nname = 'a'\ncertificate_sha256 = ['{}']", "a:".repeat(32)), "64 hexadecimal"),
        (
            format!("[[client]]\nname = 'a'\ncertificate_sha256 = ['{0}', '{0}']", "a".repeat(64)),
            "listed twice",
        ),
        ("[[client]]\nname = 'a'\nkey_sha256 = ['12']".into(), "got 2 characters"),
        ("[[client]]\nname = 'a'\nmax_concurrent = 0".into(), "at least 1"),
    ] {
        let error = Access::new(clients(&text), None).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("clients.toml");
    for text in ["", "[[client]]\nname = 'a'\ntypo = 1", "[[client]]\nname = 'a'\nbudget = -1", "words"] {
        std::fs::write(&path, text).unwrap();
        assert!(matches!(read_clients(&path), Err(AccessError::Malformed { .. })), "{text}");
    }
    assert!(matches!(read_clients(&folder.path().join("none")), Err(AccessError::File(_))));
}

/// 2026-01-31 23:59:00.
const LATE_MS: u64 = 1_769_903_940_000;

#[test]
fn limits_say_when_to_try_again() {
    let (ada, key) =
        client("ada", "requests_per_minute = 2\ntokens_per_day = 100\nmax_concurrent = 3\nbudget = \"0.5\"");
    let access = Access::new(clients(&ada), None).unwrap();
    let caller = access.check(bearer(&key).as_deref(), None).unwrap();
    let admit = |unix_ms| limits::admit(&caller.client, unix_ms);
    let first = admit(LATE_MS).unwrap();
    let second = admit(LATE_MS).unwrap();
    let denied = admit(LATE_MS).unwrap_err();
    assert_eq!(denied, Denied::RequestsPerMinute { limit: 2, retry_after_s: 30 });
    assert_eq!((denied.status(), denied.retry_after_s()), (429, Some(30)));
    assert_eq!(admit(LATE_MS + 29_001).unwrap_err().retry_after_s(), Some(1));
    let third = admit(LATE_MS + 30_000).unwrap();
    assert_eq!(admit(LATE_MS + 59_999).unwrap_err(), Denied::Concurrent { limit: 3 });
    drop(second);

    // The tokens of a day.
    let used = Receipt { prompt_tokens: 90, completion_tokens: 10, cost_nano: 100, ..Receipt::default() };
    first.charge_at(&used, LATE_MS + 30_000);
    let denied = admit(LATE_MS + 30_500).unwrap_err();
    assert_eq!(
        denied,
        Denied::TokensPerDay {
            limit: 100,
            used: 100,
            next: "2026-02-01".parse().unwrap(),
            retry_after_s: 30
        }
    );
    let fourth = admit(LATE_MS + 60_000).unwrap();
    drop((first, third, fourth));

    // The budget of a month: this one's last day is another day, and costs add up.
    let dear = Receipt { cost_nano: 250_000_000, ..Receipt::default() };
    let day_ms = 86_400_000;
    admit(LATE_MS + day_ms).unwrap().charge_at(&dear, LATE_MS + day_ms);
    admit(LATE_MS + 2 * day_ms).unwrap().charge_at(&dear, LATE_MS + 2 * day_ms);
    let denied = admit(LATE_MS + 3 * day_ms).unwrap_err();
    assert!(matches!(denied, Denied::Budget { .. }), "{denied}");
    assert!(denied.to_string().ends_with("try again from 2026-03-01 00:00 UTC"), "{denied}");
    // February has 25 more days, and a minute.
    assert_eq!(denied.retry_after_s(), Some(25 * 86_400 + 60));
    admit(LATE_MS + 40 * day_ms).unwrap();
}

#[test]
fn counts_survive_a_reload_and_a_restart() {
    let (ada, key) = client("ada", "tokens_per_day = 10\nmax_concurrent = 1");
    let access = Access::new(clients(&ada), None).unwrap();
    let running = access.check(bearer(&key).as_deref(), None).unwrap().admit().unwrap();
    let (bob, bob_key) = client("bob", "");
    access.reload(clients(&format!("{ada}{bob}")), None).unwrap();
    let caller = access.check(bearer(&key).as_deref(), None).unwrap();
    assert_eq!(caller.admit().unwrap_err(), Denied::Concurrent { limit: 1 });
    drop(running);
    drop(caller.admit().unwrap());
    access.check(bearer(&bob_key).as_deref(), None).unwrap();
    assert!(access.reload(clients("[[client]]\nname = 'a'\n[[client]]\nname = 'a'"), None).is_err());
    access.check(bearer(&bob_key).as_deref(), None).unwrap();

    let folder = tempfile::tempdir().unwrap();
    let mut ledger = Ledger::open(&folder.path().join("ledger.db"), Durability::Normal).unwrap();
    let receipt = |currency: &str| {
        let (client, currency) = ("ada".into(), currency.into());
        let receipt = Receipt { client, currency, prompt_tokens: 6, cost_nano: 5, ..Receipt::default() };
        Entry::receipt(&receipt).unwrap()
    };
    ledger.append(&[receipt("EUR"), receipt("USD")]).unwrap();
    // Twice is as once.
    access.recover(&ledger, "EUR").unwrap();
    access.recover(&ledger, "EUR").unwrap();
    let denied = caller.admit().unwrap_err();
    assert!(matches!(denied, Denied::TokensPerDay { limit: 10, used: 12, .. }), "{denied:?}");
}

/// A private key for tests only: Ed25519, as PKCS #8 in hexadecimal digits.
const ED25519: &str =
    "302e020100300506032b6570042204200101010101010101010101010101010101010101010101010101010101010101";

fn signer() -> EncodingKey {
    let der: Vec<u8> =
        (0..ED25519.len() / 2).map(|i| u8::from_str_radix(&ED25519[2 * i..2 * i + 2], 16).unwrap()).collect();
    EncodingKey::from_ed_der(&der)
}

fn jwt(folder: &Path) -> JwtConfig {
    let jwks = folder.join("jwks.json");
    let mut key = Jwk::from_encoding_key(&signer(), Algorithm::EdDSA).unwrap();
    key.common.key_id = Some("one".into());
    std::fs::write(&jwks, serde_json::to_string(&JwkSet { keys: vec![key] }).unwrap()).unwrap();
    let config = json!({ "jwks": jwks, "issuer": "https://issuer", "audience": ["halite"] });
    serde_json::from_value(config).unwrap()
}

fn token(header: Header, claims: &Value) -> Option<String> {
    bearer(&encode(&header, claims, &signer()).unwrap())
}

#[test]
fn a_token_is_its_client_with_the_scopes_of_both() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = jwt(folder.path());
    let (bob, bob_key) = client("bob", "");
    let clients = clients(&format!("[[client]]\nname = 'ada'\n{bob}"));
    let access = Access::new(clients.clone(), Some(&config)).unwrap();
    let header = || Header { kid: Some("one".into()), ..Header::new(Algorithm::EdDSA) };
    let claims = json!({
        "iss": "https://issuer", "aud": "halite", "exp": 4_000_000_000u64, "sub": "ada", "scope": "openid generate admin",
    });
    let caller = access.check(token(header(), &claims).as_deref(), None).unwrap();
    assert_eq!(caller.client().name(), "ada");
    caller.require(Scope::Generate).unwrap();
    // Neither what the client lacks, nor what the token lacks.
    assert!(caller.require(Scope::Admin).is_err() && caller.require(Scope::Embed).is_err());
    access.check(bearer(&bob_key).as_deref(), None).unwrap();

    let changed = |field: &str, value: Value| {
        let mut claims = claims.clone();
        claims[field] = value;
        claims
    };
    for claims in [
        changed("iss", json!("https://other")),
        changed("aud", json!(["other"])),
        changed("exp", json!(1_000_000_000)),
        changed("nbf", json!(3_900_000_000u64)),
        changed("sub", json!("nobody")),
        changed("sub", json!(7)),
        changed("scope", json!(7)),
        json!({ "sub": "ada" }),
    ] {
        let denied = access.check(token(header(), &claims).as_deref(), None).unwrap_err();
        assert!(matches!(denied, Denied::Token(_)), "{claims}: {denied:?}");
    }
    let no_scopes = changed("scope", json!([]));
    assert!(
        access.check(token(header(), &no_scopes).as_deref(), None).unwrap().require(Scope::Generate).is_err()
    );
    // Another key, another algorithm, none at all.
    let other = Header { kid: Some("two".into()), ..header() };
    assert!(access.check(token(other, &claims).as_deref(), None).is_err());
    let secret = EncodingKey::from_secret(b"secret").unwrap();
    let symmetric = encode(&Header::new(Algorithm::HS256), &claims, &secret).unwrap();
    let valid = token(header(), &claims).unwrap();
    let (rest, signature) = valid.rsplit_once('.').unwrap();
    let unsigned = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEifQ.";
    let forged = format!("{}.{signature}", &rest[..rest.len() - 1]);
    for header in [bearer(&symmetric), bearer(unsigned), Some(forged), bearer("a.b.c"), bearer("x")] {
        let denied = access.check(header.as_deref(), None).unwrap_err();
        assert!(matches!(denied, Denied::Token(_)), "{denied:?}");
    }

    config.default_client = Some("bob".into());
    access.reload(clients.clone(), Some(&config)).unwrap();
    let caller = access.check(token(header(), &changed("sub", json!("nobody"))).as_deref(), None).unwrap();
    assert_eq!(caller.client().name(), "bob");
    config.default_client = Some("carol".into());
    assert!(access.reload(clients.clone(), Some(&config)).is_err());
    std::fs::write(&config.jwks, "{\"keys\": []}").unwrap();
    assert!(matches!(Access::new(clients, Some(&config)), Err(AccessError::Malformed { .. })));
}
