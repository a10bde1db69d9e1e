//! Policies from the collector: which bundle is believed, and what is kept of
//! it. Whatever is wrong with one changes nothing, and is told.

use crate::cli::{Exit, Failure, RunArgs};
use crate::event::{Body, Bus, pb};
use crate::feed::PolicyLink;
use crate::policy::bundle::{self, Bundle, BundleError, PublicKeys, is_group};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;

/// Of a key file.
const MAX_KEY_BYTES: u64 = 64 << 10;
/// Findings about refused bundles: a collector that sends one after the other
/// does not fill the log.
const FINDINGS: Duration = Duration::from_secs(10);

/// Why a bundle is not taken; `kind` is that of the finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub kind: &'static str,
    pub hash: String,
    pub text: String,
}

pub struct Bundles {
    keys: PublicKeys,
    group: String,
    dir: PathBuf,
    /// The version that was in force last, over restarts.
    floor: u64,
    current: Option<Arc<Bundle>>,
    /// What was wrong with the one that was kept.
    unkept: Option<Refusal>,
    state: watch::Sender<pb::BundleState>,
    told: Option<Instant>,
    untold: u64,
}

/// A bundle that is on the disk, and not yet in the place of the one before.
pub struct Staged(PathBuf);

impl Bundles {
    /// `None`: no key is pinned, so none is taken. What was kept is in force
    /// until the collector says something else.
    pub fn open(args: &RunArgs) -> anyhow::Result<Option<Bundles>> {
        let group = args.group.clone().unwrap_or_default();
        if !group.is_empty() && !is_group(&group) {
            let message = format!("--group {group:?}: 1 to 128 printable ASCII characters without spaces");
            return Err(Failure::new(Exit::Usage, message).into());
        }
        if args.policy_key.is_empty() {
            return Ok(None);
        }
        let mut keys = PublicKeys::default();
        for path in &args.policy_key {
            let failed = |why: String| {
                Failure::new(Exit::Failure, format!("--policy-key {}: {why}", path.display()))
                    .hint("`mcp-sensor policy keygen` makes a pair; the sensor needs the public one")
            };
            let mut pem = Vec::new();
            File::open(path)
                .and_then(|file| file.take(MAX_KEY_BYTES).read_to_end(&mut pem))
                .map_err(|e| failed(e.to_string()))?;
            keys.extend(PublicKeys::read_pem(&pem).map_err(|e| failed(e.to_string()))?);
        }
        let mut bundles = Bundles {
            keys,
            group,
            dir: args.state_dir.clone(),
            floor: 0,
            current: None,
            unkept: None,
            state: watch::Sender::default(),
            told: None,
            untold: 0,
        };
        bundles.floor = bundles.read_floor()?;
        match bundles.read_kept() {
            Ok(kept) => bundles.current = kept.map(Arc::new),
            Err(refusal) => bundles.unkept = Some(refusal),
        }
        bundles.show(None);
        Ok(Some(bundles))
    }

    /// To the feed, which hears of bundles and passes on what became of them.
    pub fn link(&self) -> (PolicyLink, watch::Receiver<Vec<u8>>) {
        let (offers, offered) = watch::channel(Vec::new());
        (PolicyLink { offers, state: self.state.subscribe() }, offered)
    }

    pub fn current(&self) -> Option<Arc<Bundle>> {
        self.current.clone()
    }

    pub fn state(&self) -> pb::BundleState {
        self.state.borrow().clone()
    }

    fn kept(&self) -> PathBuf {
        self.dir.join("policy.bundle")
    }

    fn floor_file(&self) -> PathBuf {
        self.dir.join("policy.version")
    }

    fn read_floor(&self) -> anyhow::Result<u64> {
        let path = self.floor_file();
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            Err(error) => {
                return Err(Failure::new(Exit::Failure, format!("{}: {error}", path.display())).into());
            }
        };
        text.trim().parse().map_err(|_| {
            Failure::new(Exit::Failure, format!("{}: not the version of a policy", path.display()))
                .hint("write the version that was in force last; without the file any is taken")
                .into()
        })
    }

    fn read_kept(&self) -> Result<Option<Bundle>, Refusal> {
        let path = self.kept();
        let mut bytes = Vec::new();
        let read = File::open(&path)
            .and_then(|file| file.take(bundle::MAX_BYTES as u64 + 1).read_to_end(&mut bytes));
        match read {
            Ok(_) => self.believe(&bytes).map(Some).map_err(|refusal| Refusal {
                text: format!(
                    "{}: {}; only the policy of this host is in force",
                    path.display(),
                    refusal.text
                ),
                ..refusal
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Refusal {
                kind: "policy_bundle_malformed",
                hash: String::new(),
                text: format!("{}: {error}; only the policy of this host is in force", path.display()),
            }),
        }
    }

    /// Whether it is what a pinned key signed, for this sensor, and not older
    /// than what there was.
    fn believe(&self, bytes: &[u8]) -> Result<Bundle, Refusal> {
        let refusal = |kind, hash: &str, text: String| Refusal { kind, hash: hash.to_owned(), text };
        let bundle =
            Bundle::parse(bytes).map_err(|e| refusal("policy_bundle_malformed", "", e.to_string()))?;
        let no = |kind, text: String| Err(refusal(kind, &bundle.hash, text));
        if let Err(error) = bundle.verify(&self.keys) {
            let help = match error {
                BundleError::UnknownKey { .. } => "; pin its key with --policy-key, if it is to be trusted",
                _ => "",
            };
            return no("policy_bundle_signature", format!("{error}{help}"));
        }
        if !bundle.group.is_empty() && bundle.group != self.group {
            let text = format!("it is for the group {:?}, this sensor is of {:?}", bundle.group, self.group);
            return no("policy_bundle_group", text);
        }
        if bundle.version < self.floor && !bundle.allow_rollback {
            let (new, old) = (bundle.version, self.floor);
            let text = format!(
                "version {new} after version {old}; sign what it says with a higher version, or with --allow-rollback"
            );
            return no("policy_bundle_rollback", text);
        }
        Ok(bundle)
    }

    /// A bundle that may take the place of the one in force; `None`: it is that
    /// one.
    pub fn admit(&self, bytes: &[u8]) -> Result<Option<Bundle>, Refusal> {
        if self.current.as_ref().is_some_and(|current| current.signed == bytes) {
            return Ok(None);
        }
        let bundle = self.believe(bytes)?;
        let Some(current) = &self.current else { return Ok(Some(bundle)) };
        if current.hash == bundle.hash {
            return Ok(None);
        }
        if current.version == bundle.version {
            return Err(Refusal {
                kind: "policy_bundle_rollback",
                text: format!("version {} is in force and says something else", bundle.version),
                hash: bundle.hash,
            });
        }
        Ok(Some(bundle))
    }

    /// Brings it to the disk, beside the one that is kept.
    pub fn stage(&self, bundle: &Bundle) -> io::Result<Staged> {
        let path = self.kept().with_extension("bundle.new");
        write(&path, &bundle.signed)?;
        Ok(Staged(path))
    }

    /// It is in force.
    pub fn keep(&mut self, bundle: Arc<Bundle>, staged: &Staged) -> io::Result<()> {
        self.floor = bundle.version;
        self.current = Some(bundle);
        self.show(None);
        fs::rename(&staged.0, self.kept())?;
        let floor = self.floor_file();
        let new = floor.with_extension("version.new");
        write(&new, format!("{}\n", self.floor).as_bytes())?;
        fs::rename(new, floor)?;
        File::open(&self.dir)?.sync_all()
    }

    /// What the last run left and cannot be used.
    pub fn report_unkept(&mut self, bus: &Bus) {
        if let Some(refusal) = self.unkept.take() {
            self.refuse(bus, refusal);
        }
    }

    pub fn refuse(&mut self, bus: &Bus, refusal: Refusal) {
        let before = self.state.borrow().clone();
        let again = before.kind == refusal.kind
            && before.refused_hash == refusal.hash
            && before.error == refusal.text;
        self.show(Some(&refusal));
        if again {
            return;
        }
        tracing::error!(kind = refusal.kind, hash = %refusal.hash, error = %refusal.text, "a policy bundle is refused");
        if self.told.is_some_and(|at| at.elapsed() < FINDINGS) {
            self.untold += 1;
            return;
        }
        self.told = Some(Instant::now());
        let more = match std::mem::take(&mut self.untold) {
            0 => String::new(),
            n => format!(" ({n} more were refused since the last report)"),
        };
        let mut finding = pb::Finding {
            kind: refusal.kind.to_owned(),
            detail: format!("{}; nothing was changed{more}", refusal.text),
            value_hash: refusal.hash,
            ..Default::default()
        };
        finding.set_severity(pb::Severity::High);
        bus.publish_now(Body::Finding(finding));
    }

    /// The one that is offered is in force already.
    pub fn settled(&self) {
        self.show(None);
    }

    fn show(&self, refused: Option<&Refusal>) {
        let current = self.current.as_ref();
        let state = pb::BundleState {
            version: current.map_or(0, |b| b.version),
            hash: current.map(|b| b.hash.clone()).unwrap_or_default(),
            refused_hash: refused.map(|r| r.hash.clone()).unwrap_or_default(),
            kind: refused.map(|r| r.kind.to_owned()).unwrap_or_default(),
            error: refused.map(|r| r.text.clone()).unwrap_or_default(),
            group: self.group.clone(),
        };
        self.state.send_if_modified(|shown| {
            let changed = *shown != state;
            *shown = state;
            changed
        });
    }
}

fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Identity, Limits};
    use crate::policy::bundle::{Draft, SigningKey};

    fn open(dir: &Path, keys: &[&SigningKey]) -> Bundles {
        let mut arguments = vec!["mcp-sensor".to_owned(), "run".to_owned(), "--group=web".to_owned()];
        arguments.extend(["--collector=unix:/c".to_owned(), format!("--state-dir={}", dir.display())]);
        for (n, key) in keys.iter().enumerate() {
            let path = dir.join(format!("{n}.pub"));
            fs::write(&path, key.public_pem()).unwrap();
            arguments.push(format!("--policy-key={}", path.display()));
        }
        let cli = <crate::cli::Cli as clap::Parser>::try_parse_from(arguments).unwrap();
        let crate::cli::Command::Run(args) = cli.command else { panic!() };
        Bundles::open(&args).unwrap().unwrap()
    }

    fn signed(key: &SigningKey, version: u64, change: impl FnOnce(&mut Draft)) -> Bundle {
        let files = vec![("p.yaml".to_owned(), format!("version: 1 # {version}\n").into_bytes())];
        let mut draft = Draft { version, files, ..Draft::default() };
        change(&mut draft);
        draft.sign(key).unwrap()
    }

    fn put_in_force(bundles: &mut Bundles, bundle: Bundle) {
        let staged = bundles.stage(&bundle).unwrap();
        bundles.keep(Arc::new(bundle), &staged).unwrap();
    }

    fn kind(bundles: &Bundles, bundle: &Bundle) -> &'static str {
        match bundles.admit(&bundle.signed) {
            Ok(Some(_)) => "taken",
            Ok(None) => "in force",
            Err(refusal) => refusal.kind,
        }
    }

    #[test]
    fn versions_only_grow_unless_the_bundle_says_so_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let key = SigningKey::generate().unwrap();
        let mut bundles = open(dir.path(), &[&key]);
        let five = signed(&key, 5, |_| ());
        assert_eq!(kind(&bundles, &five), "taken");
        put_in_force(&mut bundles, five.clone());
        for bundles in [&bundles, &open(dir.path(), &[&key])] {
            assert_eq!(bundles.current().unwrap().hash, five.hash);
            assert_eq!(kind(bundles, &five), "in force");
            assert_eq!(kind(bundles, &signed(&key, 4, |_| ())), "policy_bundle_rollback");
            assert_eq!(kind(bundles, &signed(&key, 5, |d| d.delegate = true)), "policy_bundle_rollback");
            assert_eq!(kind(bundles, &signed(&key, 6, |_| ())), "taken");
            assert_eq!(kind(bundles, &signed(&key, 4, |d| d.allow_rollback = true)), "taken");
        }
        put_in_force(&mut bundles, signed(&key, 4, |d| d.allow_rollback = true));
        let again = open(dir.path(), &[&key]);
        assert_eq!((again.floor, again.current().unwrap().version), (4, 4));
        // The bundle is gone, what it was is not forgotten.
        fs::remove_file(again.kept()).unwrap();
        let again = open(dir.path(), &[&key]);
        assert!(again.current().is_none());
        assert_eq!(kind(&again, &signed(&key, 3, |_| ())), "policy_bundle_rollback");
    }

    #[test]
    fn only_what_a_pinned_key_signed_for_this_group_is_believed() {
        let dir = tempfile::tempdir().unwrap();
        let keys = [SigningKey::generate().unwrap(), SigningKey::generate().unwrap()];
        let other = SigningKey::generate().unwrap();
        let bundles = open(dir.path(), &[&keys[0], &keys[1]]);
        for key in &keys {
            assert_eq!(kind(&bundles, &signed(key, 1, |_| ())), "taken");
            assert_eq!(kind(&bundles, &signed(key, 1, |d| d.group = "web".to_owned())), "taken");
            assert_eq!(kind(&bundles, &signed(key, 1, |d| d.group = "db".to_owned())), "policy_bundle_group");
        }
        assert_eq!(kind(&bundles, &signed(&other, 1, |_| ())), "policy_bundle_signature");
        assert_eq!(bundles.admit(b"no bundle").unwrap_err().kind, "policy_bundle_malformed");
    }

    #[test]
    fn what_was_kept_and_is_bad_is_told_and_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let key = SigningKey::generate().unwrap();
        put_in_force(&mut open(dir.path(), &[&key]), signed(&key, 5, |_| ()));
        let kept = dir.path().join("policy.bundle");
        let mut bytes = fs::read(&kept).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&kept, bytes).unwrap();
        let bus = Bus::new(Identity { sensor: "s".to_owned(), boot: "b".to_owned() }, Limits::default());
        let mut bundles = open(dir.path(), &[&key]);
        assert!(bundles.current().is_none());
        bundles.report_unkept(&bus);
        let kinds: Vec<String> = bus
            .history(|_| true)
            .iter()
            .filter_map(|e| match &e.body {
                Some(Body::Finding(finding)) => Some(finding.kind.clone()),
                _ => None,
            })
            .collect();
        assert_eq!(kinds, ["policy_bundle_signature"]);
        assert_eq!((bundles.state().kind.as_str(), bundles.state().version), ("policy_bundle_signature", 0));
        fs::write(dir.path().join("policy.version"), "many").unwrap();
        let args = ["mcp-sensor", "run", "--collector=unix:/c"].map(str::to_owned);
        let more = [
            format!("--state-dir={}", dir.path().display()),
            format!("--policy-key={}", dir.path().join("0.pub").display()),
        ];
        let cli = <crate::cli::Cli as clap::Parser>::try_parse_from(args.into_iter().chain(more)).unwrap();
        let crate::cli::Command::Run(args) = cli.command else { panic!() };
        assert!(Bundles::open(&args).is_err());
    }

    #[test]
    fn the_same_refusal_is_one_finding() {
        let dir = tempfile::tempdir().unwrap();
        let key = SigningKey::generate().unwrap();
        let bus = Bus::new(Identity { sensor: "s".to_owned(), boot: "b".to_owned() }, Limits::default());
        let mut bundles = open(dir.path(), &[&key]);
        for n in [1, 1, 1, 2, 3] {
            let refusal = Refusal { kind: "policy_bundle_group", hash: n.to_string(), text: "no".to_owned() };
            bundles.refuse(&bus, refusal);
        }
        assert_eq!(bus.last_seq(), 1, "the others are counted for the next");
        assert_eq!((bundles.untold, bundles.state().refused_hash.as_str()), (2, "3"));
    }
}
