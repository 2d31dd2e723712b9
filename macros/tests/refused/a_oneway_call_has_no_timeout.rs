#[hopline::service]
trait Demo {
    #[rpc(oneway, timeout = "2s")]
    async fn put(&self);
}

fn main() {}
