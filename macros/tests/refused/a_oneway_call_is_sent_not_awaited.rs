#[hopline::service]
trait Log {
    #[rpc(oneway)]
    async fn line(&self, text: String);
}

fn spawn<F: Future + Send + 'static>(_: F) {}

async fn calls(log: LogClient) {
    log.line(String::new()).await.unwrap();
    log.line(String::new()).start().await.unwrap();
    log.line(String::new()).then(|_| {});
    let _ = log.line(String::new()).all().gather(std::time::Duration::ZERO);
    spawn(log.line(String::new()));
}

fn main() {}
