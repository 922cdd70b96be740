<?php

// An app for tests/workers/test_functions_php.py. Behind PHP's own server it serves; `php functions_app.php METHOD ARGUMENTS` calls the
// service with the client, and prints the answer as JSON.

declare(strict_types=1);

use Durable\Functions\App;
use Durable\Functions\Client;
use Durable\Functions\Definition;
use Durable\Functions\Event;
use Durable\Functions\Failed;
use Durable\Functions\ServiceError;
use Durable\Functions\Step;
use Durable\Worker\NonRetryable;

require __DIR__ . '/../autoload.php';

$note = static fn (string $what): int|false => file_put_contents((string) getenv('DIARY'), "$what\n", FILE_APPEND | LOCK_EX);
$noted = static fn (string $what): int => substr_count((string) file_get_contents((string) getenv('DIARY')), "$what\n");

$version = static fn (string $version): Definition => new Definition(
    'versioned',
    event: 'versioned/go',
    version: $version,
    handler: static function (Step $step, Event $event) use ($version): string {
        $step->waitForEvent('on', 'versioned/on', timeout: '1 hour');

        return "by $version";
    },
);
$versions = explode(',', getenv('VERSIONS') ?: '1,2');
$keys = array_values(array_filter(explode(',', getenv('KEYS') ?: '')));

$app = new App('shop', [
    new Definition(
        'order',
        event: 'order/created',
        handler: static function (Step $step, Event $event) use ($note): array {
            $id = $event->data->id;
            $charge = $step->run('charge', static function () use ($note, $id, $step): array {
                $note("charge $id");

                return ['receipt' => "r-$id", 'key' => $step->key('charge')];
            });
            $step->sleep('nap', 0.05);
            $packed = $step->waitForEvent('packed', 'order/packed', match: ['id' => $id], timeout: '1 hour');
            $step->sendEvent('tell', [['name' => 'order/told', 'data' => ['id' => $id]], ['name' => 'order/told', 'data' => ['id' => "$id again"]]]);

            $step->run('seal', static fn () => $note("seal $id"));

            return ['receipt' => $charge->receipt, 'box' => $packed?->data->box, 'by' => $packed?->name, 'key' => $charge->key === "$step->runId/charge"];
        },
    ),
    new Definition(
        'told',
        event: 'order/told',
        handler: static function (Step $step, Event $event) use ($note): void {
            $step->run('note', static fn () => $note("told {$event->data->id}"));
        },
    ),
    new Definition(
        'late',
        event: 'late/go',
        handler: static fn (Step $step, Event $event): array => ['found' => $step->waitForEvent('never', 'never', timeout: 0.05)],
    ),
    new Definition(
        'flaky',
        event: 'flaky/go',
        retries: 1,
        handler: static function (Step $step, Event $event) use ($note, $noted): int {
            return $step->run('try', static function () use ($note, $noted): int {
                $note('try');
                if ($noted('try') < 2) {
                    throw new RuntimeException('not yet');
                }

                return $noted('try');
            });
        },
    ),
    new Definition(
        'declined',
        event: 'declined/go',
        handler: static function (Step $step, Event $event) use ($note): void {
            try {
                $step->run('pay', static function () use ($note): never {
                    $note('pay');
                    throw new NonRetryable('card declined', 'card_declined', ['limit' => 5]);
                });
            } catch (Throwable) {
                $note('swallowed');
            }
        },
        onFailure: static function (Step $step, Event $event, Failed $failed) use ($note): void {
            $step->run('apologise', static fn () => $note("sorry: $failed->message, $failed->code, $failed->stepId, {$failed->details->limit}"));
        },
    ),
    ...array_map($version, $versions),
], keys: $keys);

if (PHP_SAPI !== 'cli') {
    $app->serve();

    return;
}
[, $method, $arguments] = $argv;
$given = json_decode($arguments, true, 512, JSON_THROW_ON_ERROR);
try {
    $url = (string) getenv('DURABLE_URL');
    if ($method === 'provision') {
        $answer = Client::provision($url, 'shop', 'dev', $given[0], $given[1]);
    } else {
        $client = new Client($url, (string) getenv('APP_ID'), $keys[0]);
        $answer = $client->{$method}(...($method === 'sync' ? [$app, ...$given] : $given));
    }
    echo json_encode($answer, JSON_THROW_ON_ERROR);
} catch (ServiceError $error) {
    echo json_encode(['refused' => $error->getCode(), 'code' => $error->errorCode]);
}
