#[hopline::service]
trait Demo {
    #[rpc(timeout = "0ms")]
    async fn put(&self);
}

fn main() {}
