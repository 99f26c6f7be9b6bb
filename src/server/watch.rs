//! Watches the configuration file: one `Change` for each save, whatever way it was saved.
//!
//! Editors, `sed -i`, `install` and the kubelet replace a file in many steps, and in a ConfigMap volume none of the
//! events names the file. So events only say that it is time to look. What counts is the content: events settle, the
//! whole file is read, and its hash is compared with that of what was delivered last. A slow poll of the same hash
//! catches what events miss: network file systems, bind mounts, a directory that was replaced further up.

use std::collections::{BTreeSet, VecDeque};
use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::io;
use std::mem::take;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinHandle;

use crate::config::load;
use crate::control::{ReloadReport, ReloadTrigger};

/// Symbolic links followed on the way to the file: the kernel's own limit.
const SYMLINKS_MAX: usize = 40;

/// Tells contents of the file apart, within one process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentHash(u64);

impl ContentHash {
    /// Modification times lie; contents do not.
    pub fn of(content: &[u8]) -> ContentHash {
        let mut hasher = DefaultHasher::new();
        hasher.write(content);
        ContentHash(hasher.finish())
    }
}

/// Reads the file as the watch does, before there is one.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    // Asked before opening: to open a pipe would wait for its writer.
    let kind = fs::metadata(path)?.file_type();
    if !kind.is_file() && !kind.is_dir() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    load::read(path)
}

/// The file is not what was delivered last.
#[derive(Debug)]
pub struct Change {
    /// All of the file, settled; or why it cannot be read. Empty only if it stayed so.
    pub content: io::Result<Vec<u8>>,
    /// There is no second try after this one: report what is wrong with it.
    pub last_try: bool,
    /// Who asked for it: then it may be what was delivered last. Empty: the watch found it.
    pub asked: Vec<Asked>,
}

/// A reload that begins elsewhere: SIGHUP, `POST /reload`.
#[derive(Debug)]
pub struct Asked {
    /// Where.
    pub trigger: ReloadTrigger,
    /// Whoever waits for the report.
    pub reply: Option<Reply>,
}

impl Asked {
    fn waits(&self) -> bool {
        self.reply.as_ref().is_some_and(|reply| !reply.is_closed())
    }
}

/// Gets the report of a reload.
pub type Reply = oneshot::Sender<Arc<ReloadReport>>;

/// The watch of one file. The control loop's side of it:
///
/// ```text
/// change = watch.changed() => match parse(&change.content) {
///     Ok(config) => apply(config),
///     Err(_) if watch.retry() => {}         // half a save, perhaps: it comes once more
///     Err(errors) => report(errors),
/// }
/// command = commands.recv() => watch.ask(command),    // SIGHUP, `POST /reload`
/// ```
#[derive(Debug)]
pub struct Watch {
    path: PathBuf,
    timing: Timing,
    shared: Arc<Shared>,
    state: State,
    /// `None` while a look has it.
    directories: Option<Directories>,
    look: Option<JoinHandle<(Directories, io::Result<Vec<u8>>)>>,
    /// Who waits for the next look.
    asked: Vec<Asked>,
    /// Who waits for the one under way.
    looking_for: Vec<Asked>,
    /// A pipe is read once; it has no later version.
    is_pipe: bool,
}

impl Watch {
    /// Begins to watch `path`, of which the content `loaded` already runs; what was saved since it was read is found
    /// too. Also returns warnings for the log: why changes may come late, or not at all.
    pub fn start(path: &Path, loaded: ContentHash) -> (Watch, Vec<String>) {
        Watch::start_timed(path, loaded, Timing::default())
    }

    fn start_timed(path: &Path, loaded: ContentHash, timing: Timing) -> (Watch, Vec<String>) {
        // Only an empty path has no absolute one, and that was never loaded.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let now = Instant::now();
        let shared = Arc::new(Shared::default());
        let is_pipe = fs::metadata(&path).is_ok_and(|metadata| !metadata.is_file());
        let mut warnings = Vec::new();
        let mut directories = Directories { watcher: None, armed: BTreeSet::new() };
        if is_pipe {
            warnings.push(format!("{}: not a regular file: changes of it are not seen", path.display()));
        } else {
            let trail = Trail::of(&path);
            let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
            if let Some(hop) = trail.hops.iter().find(|hop| is_mount_point(&mounts, hop)) {
                warnings.push(format!(
                    "{}: the file itself is a mount point (subPath in Kubernetes, -v FILE:FILE in Docker), so a new \
                     version of it may never arrive here; mount its directory instead",
                    hop.display()
                ));
            }
            let begun = shared.clone();
            let armed = notify::recommended_watcher(move |event| {
                if is_of_interest(&event) {
                    begun.event(Instant::now());
                }
            })
            .and_then(|watcher| {
                directories.watcher = Some(watcher);
                directories.arm(trail.directories)
            });
            if let Err(error) = armed {
                warnings.push(format!(
                    "{}: no file events ({error}): it is read every {} s instead",
                    path.display(),
                    timing.poll.as_secs()
                ));
            }
            shared.event(now);
        }
        let state = State::new(loaded, now + timing.poll);
        let (directories, asked, looking_for) = (Some(directories), Vec::new(), Vec::new());
        let watch = Watch { path, timing, shared, state, directories, look: None, asked, looking_for, is_pipe };
        (watch, warnings)
    }

    /// Waits for the next change. Nothing is lost when the future is dropped before it is ready.
    pub async fn changed(&mut self) -> Change {
        loop {
            if let Some(look) = &mut self.look {
                let looked = look.await;
                self.look = None;
                let Ok((directories, content)) = looked else {
                    // The runtime is shutting down: a look does not panic.
                    return std::future::pending().await;
                };
                self.directories = Some(directories);
                let now = Instant::now();
                match self.state.looked(content, now, &self.timing) {
                    Verdict::Nothing => {}
                    Verdict::Settle => self.shared.event(now),
                    Verdict::Deliver(change) => return Change { asked: take(&mut self.looking_for), ..change },
                }
            }
            if !self.asked.is_empty() {
                self.state.begin_asked();
                self.looking_for = take(&mut self.asked);
                self.look = self.directories.take().map(|directories| look(directories, &self.path));
                continue;
            }
            if self.is_pipe {
                return std::future::pending().await;
            }
            let due = self.state.due(self.shared.burst(), &self.timing);
            if due <= Instant::now() {
                self.state.begin(self.shared.take_burst());
                self.look = self.directories.take().map(|directories| look(directories, &self.path));
                continue;
            }
            tokio::select! {
                () = self.shared.begun.notified() => {}
                () = tokio::time::sleep_until(due.into()) => {}
            }
        }
    }

    /// The content that was just delivered does not parse: have it, or what is there by then, once more after 250 ms,
    /// though it be the same. False if that was its last try: the time to report.
    #[must_use = "false: nothing follows, so report"]
    pub fn retry(&mut self) -> bool {
        self.state.retry(Instant::now(), &self.timing)
    }

    /// Looks as soon as `changed` is called again, and delivers what is there by then. Of those that nobody waits for
    /// one is enough: a look may take hours, and signals go on.
    pub fn ask(&mut self, asked: Asked) {
        self.state.asked(Instant::now());
        self.asked.push(asked);
        let mut has_one = false;
        self.asked.retain(|asked| asked.waits() || !std::mem::replace(&mut has_one, true));
    }

    /// Those that asked and have nothing yet, where `changed` is called no more.
    pub fn take_asked(&mut self) -> Vec<Asked> {
        take(&mut self.looking_for).into_iter().chain(take(&mut self.asked)).collect()
    }
}

/// Arms first and reads then: what is saved after the reading makes an event. On a thread of its own, because a
/// network file system may hang, and the control thread must not.
fn look(mut directories: Directories, path: &Path) -> JoinHandle<(Directories, io::Result<Vec<u8>>)> {
    let path = path.to_owned();
    tokio::task::spawn_blocking(move || {
        if let Err(error) = directories.arm(Trail::of(&path).directories) {
            tracing::debug!(%error, "a directory of the configuration is not watched; the poll still sees changes");
        }
        let content = read(&path);
        if content.as_ref().is_err_and(is_shortage) {
            tracing::debug!("no descriptor is left to look at the configuration with; trying again");
        }
        (directories, content)
    })
}

/// How long things take; tests shorten it.
#[derive(Clone, Copy, Debug)]
struct Timing {
    /// Events have settled when none came for this long ...
    quiet: Duration,
    /// ... or this long after the first of them.
    settle_max: Duration,
    /// From the first try to the second.
    retry: Duration,
    /// From one look to the next if there are no events.
    poll: Duration,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            quiet: Duration::from_millis(100),
            settle_max: Duration::from_secs(1),
            retry: Duration::from_millis(250),
            poll: Duration::from_secs(5),
        }
    }
}

/// Events that came since the last look.
#[derive(Clone, Copy, Debug)]
struct Burst {
    first: Instant,
    last: Instant,
}

/// Between the thread that receives events and `changed`, which is woken by the first of a burst only: a log file
/// in the same directory may make thousands a second.
#[derive(Debug, Default)]
struct Shared {
    burst: Mutex<Option<Burst>>,
    begun: Notify,
}

impl Shared {
    fn event(&self, now: Instant) {
        let mut burst = self.burst.lock().expect("nobody panics under this lock");
        match &mut *burst {
            Some(burst) => burst.last = now,
            None => {
                *burst = Some(Burst { first: now, last: now });
                self.begun.notify_one();
            }
        }
    }

    fn burst(&self) -> Option<Burst> {
        *self.burst.lock().expect("nobody panics under this lock")
    }

    fn take_burst(&self) -> Option<Burst> {
        self.burst.lock().expect("nobody panics under this lock").take()
    }
}

/// Reading makes events as well (open, close without writing), our own reading and the kubelet's: to look at those
/// would be a loop. An error or an overflow means that events were lost.
fn is_of_interest(event: &notify::Result<notify::Event>) -> bool {
    event.as_ref().map_or(true, |event| match event.kind {
        EventKind::Access(access) => access == AccessKind::Close(AccessMode::Write) || event.need_rescan(),
        _ => true,
    })
}

/// Were there no descriptors to look with?
fn is_shortage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE))
}

/// What a look saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Content(ContentHash),
    Unreadable(io::ErrorKind),
}

/// Why a look is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reason {
    /// Nothing happened for a while.
    Poll,
    /// Events have settled.
    Settled,
    /// The second try; `forced`: what the first one saw was delivered, and did not parse.
    Second { forced: bool },
    /// Somebody asked.
    Asked,
    /// Somebody asked meanwhile: this look may have seen an older content.
    Stale,
}

/// What to do after a look.
#[derive(Debug)]
enum Verdict {
    Nothing,
    /// Look again, as if there had been an event.
    Settle,
    Deliver(Change),
}

/// Every decision of the watch, without file or clock.
#[derive(Debug)]
struct State {
    delivered: Seen,
    /// What was delivered last had been looked at once only.
    may_retry: bool,
    second: Option<Second>,
    poll_at: Instant,
    looking: Option<Reason>,
}

/// A second try that is due.
#[derive(Clone, Copy, Debug)]
struct Second {
    at: Instant,
    forced: bool,
}

impl State {
    fn new(loaded: ContentHash, poll_at: Instant) -> State {
        State { delivered: Seen::Content(loaded), may_retry: false, second: None, poll_at, looking: None }
    }

    /// When to look next.
    fn due(&self, burst: Option<Burst>, timing: &Timing) -> Instant {
        let settled = burst.map(|burst| (burst.last + timing.quiet).min(burst.first + timing.settle_max));
        let second = self.second.map(|second| second.at);
        // Events put the second try off until they settle, and they do within `settle_max`.
        settled.max(second).unwrap_or(self.poll_at)
    }

    fn begin(&mut self, burst: Option<Burst>) {
        self.looking = Some(match (self.second.take(), burst) {
            (Some(second), _) => Reason::Second { forced: second.forced },
            (None, Some(_)) => Reason::Settled,
            (None, None) => Reason::Poll,
        });
    }

    /// As somebody asked; what else is due stays so.
    fn begin_asked(&mut self) {
        self.looking = Some(Reason::Asked);
    }

    fn looked(&mut self, content: io::Result<Vec<u8>>, now: Instant, timing: &Timing) -> Verdict {
        self.poll_at = now + timing.poll;
        let seen = match &content {
            Ok(content) => Seen::Content(ContentHash::of(content)),
            Err(error) => Seen::Unreadable(error.kind()),
        };
        let is_same = seen == self.delivered;
        let is_incomplete = content.as_ref().map_or(true, Vec::is_empty);
        let is_short = content.as_ref().is_err_and(is_shortage);
        let last_try = match self.looking.take().expect("a look was begun") {
            Reason::Stale => return Verdict::Settle,
            // What cannot be read is told to who asked; the watch still tells of it in its own time.
            Reason::Asked if content.is_err() => {
                return Verdict::Deliver(Change { content, last_try: true, asked: Vec::new() });
            }
            Reason::Asked => {
                self.second = None;
                true
            }
            Reason::Poll if is_short => return Verdict::Nothing,
            // This machine could not look: that says nothing about the file.
            reason if is_short => {
                let forced = reason == Reason::Second { forced: true };
                self.second = Some(Second { at: now + timing.retry, forced });
                return Verdict::Nothing;
            }
            Reason::Second { forced: true } => true,
            _ if is_same => return Verdict::Nothing,
            // Perhaps in the middle of a save whose events do not reach this machine.
            Reason::Poll => return Verdict::Settle,
            // What was absent or empty at first and is there now has had one look only.
            Reason::Second { forced: false } => is_incomplete,
            Reason::Settled if is_incomplete => {
                self.second = Some(Second { at: now + timing.retry, forced: false });
                return Verdict::Nothing;
            }
            Reason::Settled => false,
        };
        self.delivered = seen;
        self.may_retry = !last_try;
        Verdict::Deliver(Change { content, last_try, asked: Vec::new() })
    }

    fn retry(&mut self, now: Instant, timing: &Timing) -> bool {
        let may_retry = take(&mut self.may_retry);
        if may_retry {
            self.second = Some(Second { at: now + timing.retry, forced: true });
        }
        may_retry
    }

    /// A look under way may have seen what was there before; what it is for is due all the same.
    fn asked(&mut self, now: Instant) {
        if let Some(Reason::Second { forced }) = self.looking {
            self.second = Some(Second { at: now, forced });
        }
        self.looking = self.looking.map(|reason| if reason == Reason::Asked { reason } else { Reason::Stale });
    }
}

/// The directories whose events matter, and the watcher that they are armed in.
#[derive(Debug)]
struct Directories {
    watcher: Option<RecommendedWatcher>,
    armed: BTreeSet<PathBuf>,
}

impl Directories {
    /// Arms all of them anew, always: a watch belongs to an inode, and only the path is known to be the same. Events
    /// lost in between do not matter, for the file is read afterwards. Returns the first error.
    fn arm(&mut self, directories: BTreeSet<PathBuf>) -> notify::Result<()> {
        let Some(watcher) = &mut self.watcher else { return Ok(()) };
        for directory in &self.armed {
            // Fails if the directory is gone, and its watch with it.
            let _ = watcher.unwatch(directory);
        }
        let mut armed = Ok(());
        for directory in &directories {
            armed = armed.and(watcher.watch(directory, RecursiveMode::NonRecursive));
        }
        self.armed = directories;
        armed
    }
}

/// The way from the root to the file.
#[derive(Debug, Default)]
struct Trail {
    /// Real paths of the directories that hold a link of the way, or the file; where the way breaks off, the one in
    /// which something is missing.
    directories: BTreeSet<PathBuf>,
    /// Each link and the file, by the real paths of their directories.
    hops: Vec<PathBuf>,
}

impl Trail {
    fn of(path: &Path) -> Trail {
        let mut trail = Trail::default();
        let mut at = PathBuf::from("/");
        let mut names: VecDeque<OsString> = names(path).collect();
        let mut links = 0;
        while let Some(name) = names.pop_front() {
            if name == ".." {
                at.pop();
                continue;
            }
            let next = at.join(&name);
            let metadata = next.symlink_metadata();
            let target = fs::read_link(&next).ok();
            if names.is_empty() || target.is_some() || metadata.is_err() {
                trail.directories.insert(at.clone());
                trail.hops.push(next.clone());
            }
            match target {
                Some(target) if links < SYMLINKS_MAX => {
                    links += 1;
                    if target.is_absolute() {
                        at = PathBuf::from("/");
                    }
                    names = self::names(&target).chain(names).collect();
                }
                None if metadata.is_ok() => at = next,
                _ => break,
            }
        }
        trail
    }
}

/// The names of a path that move along it.
fn names(path: &Path) -> impl Iterator<Item = OsString> + '_ {
    let moves = |component: &Component<'_>| matches!(component, Component::Normal(_) | Component::ParentDir);
    path.components().filter(moves).map(|component| component.as_os_str().to_owned())
}

/// Whether something is mounted right on `path`; `mountinfo` as in proc(5): the fifth field is the mount point.
fn is_mount_point(mountinfo: &[u8], path: &Path) -> bool {
    mountinfo
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .any(|field| unescape(field) == path)
}

/// Space, tab, newline and backslash stand there as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some(first) = rest.first() {
        let octal = rest.get(1..4).and_then(|digits| u8::from_str_radix(str::from_utf8(digits).ok()?, 8).ok());
        match octal.filter(|_| *first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &rest[4..];
            }
            None => {
                bytes.push(*first);
                rest = &rest[1..];
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
#[path = "../../tests/it/support/configmap.rs"]
mod configmap;

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::process::Command;

    use super::configmap::{configmap_swap, configmap_swap_keys};
    use super::*;

    /// The real times, but no poll within a test: what arrives, arrives by events.
    const EVENTS: Timing = Timing {
        quiet: Duration::from_millis(100),
        settle_max: Duration::from_secs(1),
        retry: Duration::from_millis(250),
        poll: Duration::from_secs(3600),
    };
    const POLL: Timing = Timing { poll: Duration::from_millis(20), ..EVENTS };

    fn start(path: &Path, timing: Timing) -> Watch {
        let loaded = ContentHash::of(&fs::read(path).unwrap());
        let (watch, warnings) = Watch::start_timed(path, loaded, timing);
        assert_eq!(warnings, [""; 0]);
        watch
    }

    async fn next(watch: &mut Watch) -> Change {
        tokio::time::timeout(Duration::from_secs(60), watch.changed()).await.expect("a change within a minute")
    }

    async fn next_content(watch: &mut Watch) -> String {
        String::from_utf8(next(watch).await.content.expect("readable")).unwrap()
    }

    /// Saves on another thread, so that the watch sees every state in between that it might; then the next change
    /// must be `expected`, and the one after it the sentinel's: there was exactly one.
    async fn assert_one_change(watch: &mut Watch, expected: &str, save: impl FnOnce() + Send + 'static) {
        let saving = tokio::task::spawn_blocking(save);
        assert_eq!(next_content(watch).await, expected);
        saving.await.unwrap();
        assert_sentinel_is_next(watch).await;
    }

    async fn assert_sentinel_is_next(watch: &mut Watch) {
        let path = watch.path.clone();
        let sentinel = format!("# sentinel after {}", fs::read_to_string(&path).unwrap_or_default());
        // Into the file that is there: this way of saving leaves all the others' layouts as they are.
        fs::write(&path, &sentinel).unwrap();
        assert_eq!(next_content(watch).await, sentinel);
    }

    fn shell(directory: &Path, script: &str) {
        let status = Command::new("sh").args(["-ec", script]).current_dir(directory).status().unwrap();
        assert!(status.success(), "{script}");
    }

    /// A directory with `preface.toml` in it, which says "first".
    fn plain() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("preface.toml");
        fs::write(&path, "first\n").unwrap();
        (directory, path)
    }

    /// A ConfigMap volume of which `preface.toml` says "first".
    fn volume() -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        configmap_swap(directory.path(), "first\n");
        let path = directory.path().join("preface.toml");
        (directory, path)
    }

    #[tokio::test]
    async fn every_way_of_saving_is_one_change() {
        let (directory, path) = plain();
        let mut watch = start(&path, EVENTS);
        for (way, script) in [
            ("redirection", "echo new > preface.toml"),
            ("sed -i", "sed -i s/.*/new/ preface.toml"),
            ("mv", "echo new > other; mv other preface.toml"),
            ("mv from a directory that is not watched", "mkdir d; echo new > d/f; mv d/f preface.toml; rmdir d"),
            ("cp", "echo new > other; cp other preface.toml; rm other"),
            ("install", "echo new > other; install -m 644 other preface.toml; rm other"),
            ("ln -sfn", "echo new > other; ln -sfn other preface.toml"),
            ("cp to the target of the link", "echo new > third; cp third other"),
            ("rename over the link", "echo new > third; mv third preface.toml"),
            ("hard link", "echo new > third; ln -f third preface.toml; rm third"),
            (
                "vim, backupcopy=no",
                "> 4913; chmod 644 4913; rm 4913; mv preface.toml preface.toml~; echo new > preface.toml; \
                 chmod 644 preface.toml; rm preface.toml~",
            ),
            (
                "vim, backupcopy=yes",
                "cp preface.toml preface.toml~; : > preface.toml; echo new >> preface.toml; rm preface.toml~",
            ),
        ] {
            println!("{way}");
            let directory = directory.path().to_owned();
            assert_one_change(&mut watch, "new\n", move || shell(&directory, script)).await;
        }
    }

    #[tokio::test]
    async fn a_configmap_swap_is_one_change() {
        let (directory, path) = volume();
        let mut watch = start(&path, EVENTS);
        for content in ["second\n", "third\n", "first\n"] {
            let directory = directory.path().to_owned();
            assert_one_change(&mut watch, content, move || configmap_swap(&directory, content)).await;
        }
    }

    #[test]
    fn a_look_for_which_there_was_no_descriptor_is_made_again() {
        let now = Instant::now();
        let burst = Some(Burst { first: now, last: now });
        let short = || Err(io::Error::from_raw_os_error(libc::EMFILE));
        let mut state = State::new(ContentHash::of(b"first"), now + EVENTS.poll);
        for _ in 0..3 {
            state.begin(burst);
            assert!(matches!(state.looked(short(), now, &EVENTS), Verdict::Nothing));
            assert_eq!(state.due(None, &EVENTS), now + EVENTS.retry);
            state.begin(None);
            assert!(matches!(state.looked(short(), now, &EVENTS), Verdict::Nothing));
        }
        state.begin(None);
        let Verdict::Deliver(change) = state.looked(Ok(b"second".to_vec()), now, &EVENTS) else { panic!("a change") };
        assert_eq!(change.content.unwrap(), b"second");
        // What did not parse is tried once more, whatever comes in between.
        assert!(state.retry(now, &EVENTS));
        state.begin(None);
        assert!(matches!(state.looked(short(), now, &EVENTS), Verdict::Nothing));
        state.begin(None);
        let Verdict::Deliver(change) = state.looked(Ok(b"second".to_vec()), now, &EVENTS) else { panic!("a change") };
        assert!(change.last_try);
        // A poll that could not look waits for the next one.
        state.begin(None);
        assert!(matches!(state.looked(short(), now, &EVENTS), Verdict::Nothing));
        assert_eq!(state.due(None, &EVENTS), now + EVENTS.poll);
    }

    #[tokio::test]
    async fn the_same_content_is_no_change() {
        let (directory, path) = volume();
        let mut watch = start(&path, EVENTS);
        configmap_swap(directory.path(), "first\n");
        assert_sentinel_is_next(&mut watch).await;

        let (directory, path) = plain();
        let mut watch = start(&path, EVENTS);
        shell(directory.path(), "touch preface.toml; chmod 600 preface.toml; cp preface.toml a; mv a preface.toml");
        assert_sentinel_is_next(&mut watch).await;
    }

    #[tokio::test]
    async fn another_key_of_the_configmap_is_no_change() {
        let (directory, path) = volume();
        let mut watch = start(&path, EVENTS);
        configmap_swap_keys(directory.path(), &[("preface.toml", "first\n"), ("token", "secret")]);
        assert_sentinel_is_next(&mut watch).await;
        let directory = directory.path().to_owned();
        assert_one_change(&mut watch, "second\n", move || configmap_swap(&directory, "second\n")).await;
    }

    #[tokio::test]
    async fn a_removed_key_is_reported_once_and_its_return_is_a_change() {
        let (directory, path) = volume();
        let mut watch = start(&path, EVENTS);
        configmap_swap_keys(directory.path(), &[("other.toml", "x")]);
        let change = next(&mut watch).await;
        assert_eq!(change.content.unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(change.last_try && !watch.retry());
        // Still absent is nothing new; back again is, though it is the content that runs.
        configmap_swap_keys(directory.path(), &[("another.toml", "x")]);
        let directory = directory.path().to_owned();
        assert_one_change(&mut watch, "first\n", move || configmap_swap(&directory, "first\n")).await;
    }

    #[tokio::test]
    async fn a_link_to_a_removed_key_is_absent() {
        let (directory, path) = volume();
        let mut watch = start(&path, EVENTS);
        // The moment before the kubelet removes the link.
        shell(directory.path(), "mkdir ..new; old=$(readlink ..data); ln -s ..new t; mv -T t ..data; rm -r $old");
        assert_eq!(next(&mut watch).await.content.unwrap_err().kind(), io::ErrorKind::NotFound);
        shell(directory.path(), "echo second > ..new/preface.toml");
        assert_eq!(next_content(&mut watch).await, "second\n");
        assert_sentinel_is_next(&mut watch).await;
    }

    #[tokio::test]
    async fn an_empty_file_is_reported_on_the_second_try() {
        let (_directory, path) = plain();
        let mut watch = start(&path, EVENTS);
        let begun = Instant::now();
        fs::write(&path, "").unwrap();
        let change = next(&mut watch).await;
        assert!(begun.elapsed() >= EVENTS.quiet + EVENTS.retry);
        assert!(change.content.unwrap().is_empty() && change.last_try);
        assert_sentinel_is_next(&mut watch).await;
    }

    #[tokio::test]
    async fn what_does_not_parse_comes_twice() {
        let (directory, path) = volume();
        let mut watch = start(&path, EVENTS);
        configmap_swap(directory.path(), "invalid\n");
        let change = next(&mut watch).await;
        assert_eq!((change.content.unwrap().as_slice(), change.last_try), (&b"invalid\n"[..], false));
        assert!(watch.retry());
        assert!(!watch.retry(), "one retry each");
        let change = next(&mut watch).await;
        assert_eq!((change.content.unwrap().as_slice(), change.last_try), (&b"invalid\n"[..], true));
        assert!(!watch.retry());
        // A rollback to what ran all the time.
        let directory = directory.path().to_owned();
        assert_one_change(&mut watch, "first\n", move || configmap_swap(&directory, "first\n")).await;
    }

    #[tokio::test]
    async fn half_a_save_is_replaced_by_the_whole() {
        let (_directory, path) = plain();
        let mut watch = start(&path, EVENTS);
        fs::write(&path, "hal").unwrap();
        assert_eq!(next_content(&mut watch).await, "hal");
        assert!(watch.retry());
        fs::write(&path, "half and half").unwrap();
        let change = next(&mut watch).await;
        assert_eq!((change.content.unwrap().as_slice(), change.last_try), (&b"half and half"[..], true));
        assert_sentinel_is_next(&mut watch).await;
    }

    #[tokio::test]
    async fn two_swaps_at_once_are_one_change() {
        let (directory, path) = volume();
        let mut watch = start(&path, EVENTS);
        configmap_swap(directory.path(), "second\n");
        configmap_swap(directory.path(), "third\n");
        assert_eq!(next_content(&mut watch).await, "third\n");
        // There and back again is nothing.
        configmap_swap(directory.path(), "second\n");
        configmap_swap(directory.path(), "third\n");
        assert_sentinel_is_next(&mut watch).await;
    }

    #[tokio::test]
    async fn of_many_swaps_the_last_is_delivered() {
        let (directory, path) = volume();
        let mut watch = start(&path, EVENTS);
        let volume = directory.path().to_owned();
        let swaps = tokio::task::spawn_blocking(move || {
            (1..=200).for_each(|swap| configmap_swap(&volume, &format!("swap {swap}\n")));
        });
        let mut changes = 0;
        let mut last = 0;
        while last < 200 {
            let content = next_content(&mut watch).await;
            let swap: u32 = content.trim_start_matches("swap ").trim_end().parse().unwrap();
            assert!(swap > last, "{swap} after {last}");
            last = swap;
            changes += 1;
        }
        assert!((1..=200).contains(&changes));
        swaps.await.unwrap();
        assert_sentinel_is_next(&mut watch).await;
    }

    #[tokio::test]
    async fn endless_events_settle_all_the_same() {
        let (directory, path) = plain();
        let mut watch = start(&path, EVENTS);
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let log = directory.path().join("some.log");
        let noise = std::thread::spawn(move || {
            // Far below `quiet`, so that it is never quiet.
            while stopped.recv_timeout(Duration::from_millis(5)) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                fs::write(&log, "line").unwrap();
            }
        });
        fs::write(&path, "second\n").unwrap();
        assert_eq!(next_content(&mut watch).await, "second\n");
        assert_sentinel_is_next(&mut watch).await;
        drop(stop);
        noise.join().unwrap();
    }

    #[tokio::test]
    async fn follows_links_and_their_new_targets() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path();
        shell(root, "mkdir etc one two; ln -s ../current/a etc/preface.toml; ln -s one current; ln -s b one/a");
        shell(root, "echo first > one/b; ln -s b two/a; echo second > two/b");
        let mut watch = start(&root.join("etc/preface.toml"), EVENTS);
        let owned = root.to_owned();
        assert_one_change(&mut watch, "deep\n", move || shell(&owned, "echo deep > t; mv t one/b")).await;
        let owned = root.to_owned();
        assert_one_change(&mut watch, "second\n", move || shell(&owned, "ln -sfn two current")).await;
        let owned = root.to_owned();
        assert_one_change(&mut watch, "third\n", move || shell(&owned, "echo third > t; mv t two/b")).await;
        // A directory that the way no longer passes.
        shell(root, "echo unseen > one/b");
        assert_sentinel_is_next(&mut watch).await;
    }

    #[tokio::test]
    async fn a_relative_path_is_watched() {
        // Tests share their working directory, so the way to the file climbs out of it.
        let (directory, path) = plain();
        let depth = std::env::current_dir().unwrap().components().count() - 1;
        let relative = PathBuf::from("../".repeat(depth)).join(path.strip_prefix("/").unwrap());
        let mut watch = start(&relative, EVENTS);
        let directory = directory.path().to_owned();
        assert_one_change(&mut watch, "new\n", move || shell(&directory, "echo new > t; mv t preface.toml")).await;
    }

    #[tokio::test]
    async fn a_directory_that_was_replaced_is_watched_again() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().to_owned();
        shell(&root, "mkdir conf; echo first > conf/preface.toml");
        let mut watch = start(&root.join("conf/preface.toml"), EVENTS);
        for script in [
            "mkdir t; echo second > t/preface.toml; mv conf old; mv t conf",
            "rm -r conf; mkdir conf; echo second > conf/preface.toml",
        ] {
            println!("{script}");
            let owned = root.clone();
            assert_one_change(&mut watch, "second\n", move || shell(&owned, script)).await;
        }
        shell(&root, "rm -r conf");
        assert_eq!(next(&mut watch).await.content.unwrap_err().kind(), io::ErrorKind::NotFound);
        let owned = root.clone();
        let script = "mkdir conf; echo second > conf/preface.toml";
        assert_one_change(&mut watch, "second\n", move || shell(&owned, script)).await;
    }

    #[tokio::test]
    async fn the_poll_finds_what_makes_no_event() {
        // Nothing above the directory of the file is watched.
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().to_owned();
        shell(&root, "mkdir -p a/conf; echo first > a/conf/preface.toml");
        let mut watch = start(&root.join("a/conf/preface.toml"), POLL);
        let script = "mkdir -p b/conf; echo second > b/conf/preface.toml; mv a old; mv b a";
        let owned = root.clone();
        assert_one_change(&mut watch, "second\n", move || shell(&owned, script)).await;

        // No events at all.
        let mut watch = start(&root.join("a/conf/preface.toml"), POLL);
        watch.directories.as_mut().unwrap().watcher = None;
        for script in ["echo third > a/conf/preface.toml", "rm -r a; mkdir -p a/conf; echo third > a/conf/preface.toml"]
        {
            let owned = root.clone();
            assert_one_change(&mut watch, "third\n", move || shell(&owned, script)).await;
        }
    }

    #[tokio::test]
    async fn what_was_saved_between_loading_and_watching_is_found() {
        let (_directory, path) = plain();
        let (mut watch, _) = Watch::start_timed(&path, ContentHash::of(b"before\n"), EVENTS);
        assert_eq!(next_content(&mut watch).await, "first\n");
        assert_sentinel_is_next(&mut watch).await;
    }

    #[tokio::test]
    async fn what_another_reload_has_read_is_not_delivered() {
        let (directory, path) = plain();
        let mut watch = start(&path, EVENTS);
        shell(directory.path(), "echo second > preface.toml");
        assert_eq!(asked_content(&mut watch).await, "second\n");
        assert_sentinel_is_next(&mut watch).await;

        // Neither is the second try of what the other has reported.
        shell(directory.path(), "echo invalid > preface.toml");
        assert_eq!(next_content(&mut watch).await, "invalid\n");
        assert!(watch.retry());
        assert_eq!(asked_content(&mut watch).await, "invalid\n");
        assert_sentinel_is_next(&mut watch).await;
    }

    /// Asks by a signal; what comes of it.
    async fn asked_content(watch: &mut Watch) -> String {
        watch.ask(Asked { trigger: ReloadTrigger::Signal, reply: None });
        let change = next(watch).await;
        assert_eq!(change.asked.len(), 1);
        String::from_utf8(change.content.expect("readable")).unwrap()
    }

    #[tokio::test]
    async fn who_asks_gets_what_is_there_then_and_nobody_is_forgotten() {
        let (directory, path) = plain();
        let mut watch = start(&path, EVENTS);
        assert_eq!(asked_content(&mut watch).await, "first\n", "though it has not changed");
        let admin = || {
            let (reply, report) = oneshot::channel();
            (Asked { trigger: ReloadTrigger::Admin, reply: Some(reply) }, report)
        };
        let ((one, _one), (two, _two), (gone, report)) = (admin(), admin(), admin());
        drop(report);
        // A look has begun, and comes to its end; but for the first only.
        watch.state.begin_asked();
        watch.looking_for.push(one);
        watch.look = watch.directories.take().map(|directories| look(directories, &path));
        watch.ask(two);
        for _ in 0..100 {
            watch.ask(Asked { trigger: ReloadTrigger::Signal, reply: None });
        }
        watch.ask(gone);
        shell(directory.path(), "echo second > preface.toml");
        assert_eq!(next(&mut watch).await.asked.len(), 1);
        let change = next(&mut watch).await;
        assert_eq!(change.asked.iter().map(|asked| asked.reply.is_some()).collect::<Vec<_>>(), [true, false]);
        assert_eq!(change.content.unwrap(), b"second\n");
        // What cannot be read is told to who asks, and then by the watch.
        fs::remove_file(&path).unwrap();
        watch.ask(admin().0);
        for asked in [1, 0] {
            let change = next(&mut watch).await;
            assert_eq!((change.asked.len(), change.content.unwrap_err().kind()), (asked, io::ErrorKind::NotFound));
        }
        watch.ask(Asked { trigger: ReloadTrigger::Signal, reply: None });
        assert_eq!((watch.take_asked().len(), watch.take_asked().len()), (1, 0));
    }

    #[tokio::test]
    async fn loses_nothing_when_cancelled() {
        let (directory, path) = plain();
        let mut watch = start(&path, EVENTS);
        shell(directory.path(), "echo second > preface.toml");
        let mut cancelled = 0;
        let content = loop {
            tokio::select! {
                change = watch.changed() => break change.content.unwrap(),
                () = tokio::task::yield_now() => cancelled += 1,
            }
        };
        assert_eq!(content, b"second\n");
        assert!(cancelled > 10, "{cancelled}");
        assert_sentinel_is_next(&mut watch).await;
    }

    #[tokio::test]
    async fn reading_makes_no_event_of_interest() {
        let (_directory, path) = plain();
        let mut watch = start(&path, EVENTS);
        assert_sentinel_is_next(&mut watch).await;
        let quiet = Arc::new(Shared::default());
        let handler = quiet.clone();
        let (sender, events) = std::sync::mpsc::channel();
        let mut watcher = notify::recommended_watcher(move |event| {
            if is_of_interest(&event) {
                handler.event(Instant::now());
            }
            sender.send(event.unwrap().kind).unwrap();
        })
        .unwrap();
        watcher.watch(path.parent().unwrap(), RecursiveMode::NonRecursive).unwrap();
        read(&path).unwrap();
        let opened = events.recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(matches!(opened, EventKind::Access(AccessKind::Open(_))), "{opened:?}");
        assert!(quiet.burst().is_none());

        let rescan = notify::Event::new(EventKind::Other).set_flag(notify::event::Flag::Rescan);
        assert!(is_of_interest(&Ok(rescan)));
        assert!(is_of_interest(&Err(notify::Error::generic("lost"))));
    }

    #[tokio::test]
    async fn an_unreadable_file_is_reported_and_a_pipe_is_not_watched() {
        let (directory, path) = plain();
        let mut watch = start(&path, EVENTS);
        let larger = File::create(directory.path().join("larger")).unwrap();
        larger.set_len(load::FILE_BYTES_MAX + 1).unwrap();
        shell(directory.path(), "mv larger preface.toml");
        let change = next(&mut watch).await;
        assert_eq!(change.content.unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        shell(directory.path(), "rm preface.toml; mkfifo preface.toml");
        let change = next(&mut watch).await;
        assert_eq!(change.content.unwrap_err().to_string(), "not a regular file");

        let (mut watch, warnings) = Watch::start(&path, ContentHash::of(b"from the pipe"));
        watch.ask(Asked { trigger: ReloadTrigger::Signal, reply: None });
        assert_eq!(next(&mut watch).await.content.unwrap_err().to_string(), "not a regular file");
        assert!(watch.is_pipe);
        assert_eq!(warnings, [format!("{}: not a regular file: changes of it are not seen", path.display())]);
    }

    #[test]
    fn a_late_look_does_not_undo_a_reload() {
        let now = Instant::now();
        let mut state = State::new(ContentHash::of(b"a"), now);
        state.begin(Some(Burst { first: now, last: now }));
        state.asked(now);
        assert!(matches!(state.looked(Ok(b"b".to_vec()), now, &EVENTS), Verdict::Settle));
        // Nor does it lose the second try that it was.
        state.looking = Some(Reason::Second { forced: true });
        state.asked(now);
        assert!(matches!(state.looked(Ok(b"a".to_vec()), now, &EVENTS), Verdict::Settle));
        assert!(state.second.is_some_and(|second| second.forced));
    }

    #[test]
    fn every_look_has_its_verdict() {
        fn verdict(reason: Reason, content: io::Result<&[u8]>) -> (&'static str, bool) {
            let now = Instant::now();
            let mut state = State::new(ContentHash::of(b"runs"), now);
            state.looking = Some(reason);
            let verdict = match state.looked(content.map(<[u8]>::to_vec), now, &EVENTS) {
                Verdict::Nothing => "nothing",
                Verdict::Settle => "settle",
                Verdict::Deliver(Change { last_try: false, .. }) => "first",
                Verdict::Deliver(Change { last_try: true, .. }) => "last",
            };
            (verdict, state.second.is_some())
        }
        let absent = || Err(io::Error::from(io::ErrorKind::NotFound));
        let (second, forced) = (Reason::Second { forced: false }, Reason::Second { forced: true });
        for (reason, same, new, empty, none) in [
            (Reason::Poll, "nothing", "settle", "settle", "settle"),
            (Reason::Settled, "nothing", "first", "nothing", "nothing"),
            (second, "nothing", "first", "last", "last"),
            (forced, "last", "last", "last", "last"),
            (Reason::Asked, "last", "last", "last", "last"),
            (Reason::Stale, "settle", "settle", "settle", "settle"),
        ] {
            let again = reason == Reason::Settled;
            assert_eq!(verdict(reason, Ok(b"runs")), (same, false), "{reason:?}");
            assert_eq!(verdict(reason, Ok(b"new")), (new, false), "{reason:?}");
            assert_eq!(verdict(reason, Ok(b"")), (empty, again), "{reason:?}");
            assert_eq!(verdict(reason, absent()), (none, again), "{reason:?}");
        }
    }

    #[test]
    fn settles_after_quiet_and_after_the_longest_wait() {
        let now = Instant::now();
        let ms = Duration::from_millis;
        let mut state = State::new(ContentHash::of(b""), now + EVENTS.poll);
        let burst = |last: u64| Some(Burst { first: now, last: now + ms(last) });
        assert_eq!(state.due(None, &EVENTS), now + EVENTS.poll);
        assert_eq!(state.due(burst(0), &EVENTS), now + ms(100));
        assert_eq!(state.due(burst(899), &EVENTS), now + ms(999));
        assert_eq!(state.due(burst(5000), &EVENTS), now + ms(1000));
        state.second = Some(Second { at: now + ms(250), forced: false });
        assert_eq!(state.due(None, &EVENTS), now + ms(250));
        assert_eq!(state.due(burst(50), &EVENTS), now + ms(250));
        assert_eq!(state.due(burst(400), &EVENTS), now + ms(500));
    }

    #[test]
    fn the_trail_names_every_directory_that_matters() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        shell(&root, "mkdir -p etc real/deep; ln -s ../real etc/dir; ln -s loop loop; echo > real/deep/file");
        shell(&root, "ln -s deep/./../deep/file real/link");
        let of = |path: &str| {
            let trail = Trail::of(&root.join(path));
            let relative = |path: &PathBuf| path.strip_prefix(&root).unwrap().display().to_string();
            let directories: Vec<String> = trail.directories.iter().map(relative).collect();
            let hops: Vec<String> = trail.hops.iter().map(relative).collect();
            (directories.join(" "), hops.join(" "))
        };
        assert_eq!(of("etc/dir/link"), ("etc real real/deep".into(), "etc/dir real/link real/deep/file".into()));
        assert_eq!(of("etc/../real/deep/file"), ("real/deep".into(), "real/deep/file".into()));
        assert_eq!(of("real/absent/file"), ("real".into(), "real/absent".into()));
        let (directories, hops) = of("loop");
        assert_eq!((directories.as_str(), hops.split(' ').count()), ("", SYMLINKS_MAX + 1));
    }

    #[test]
    fn finds_a_file_that_is_a_mount_point() {
        let mounts = b"36 35 98:0 / / rw - ext4 /dev/root rw\n\
            37 36 98:1 /a/b /etc/preface/preface.toml ro,noatime master:1 - ext4 /dev/sda rw\n\
            38 36 98:1 / /mnt/with\\040space\\134 ro - ext4 /dev/sda rw\n";
        assert!(is_mount_point(mounts, Path::new("/etc/preface/preface.toml")));
        assert!(is_mount_point(mounts, Path::new("/mnt/with space\\")));
        assert!(!is_mount_point(mounts, Path::new("/etc/preface")));
        assert!(!is_mount_point(mounts, Path::new("/a/b")));
        assert_eq!(unescape(br"\04\400\x41\"), Path::new(r"\04\400\x41\"));
    }

    #[test]
    fn the_real_times_are_the_documented_ones() {
        let Timing { quiet, settle_max, retry, poll } = Timing::default();
        assert_eq!([quiet, settle_max, retry, poll].map(|time| time.as_millis()), [100, 1000, 250, 5000]);
        assert_eq!([quiet, settle_max, retry], [EVENTS.quiet, EVENTS.settle_max, EVENTS.retry]);
    }
}
